//! The files of the io controller (Documentation/admin-guide/cgroup-v2.rst), each with a line for each device.
//! Reading shows all devices; a write is of one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::BlockDevice,
    limits::Limit,
    units::{BytesPerSec, Iops, Micros, Weight},
};

use super::file::{Contents, File, Malformed, ReadOnly, Setting, hundredths, number};

/// Bytes and operations a second. A device without a ceiling has no line.
pub const MAX: File<ByDevice<IoLimits>, OfDevice<IoLimits>> = File::new("io.max");
/// Share of a contended device, where io.cost is in force. (BFQ has a file of its own.)
pub const WEIGHT: File<IoWeight, SetIoWeight> = File::new("io.weight");
/// Share of a contended device, where its scheduler is BFQ.
pub const BFQ_WEIGHT: File<IoWeight, SetIoWeight> = File::new("io.bfq.weight");
/// What was done.
pub const STAT: File<ByDevice<IoStat>, ReadOnly> = File::new("io.stat");
/// What a device is to deliver to io.cost; at the root alone.
pub const COST_QOS: File<ByDevice<CostQos>, OfDevice<CostQos>> = File::new("io.cost.qos");
/// What a device can do; at the root alone.
pub const COST_MODEL: File<ByDevice<CostModel>, OfDevice<CostModel>> = File::new("io.cost.model");

/// What a file says of each device.
pub type ByDevice<T> = BTreeMap<BlockDevice, T>;

/// What is written for one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfDevice<T>(pub BlockDevice, pub T);

/// The fields behind a device: `name=value`, with a space between.
struct Fields<'a>(&'a str);

impl Fields<'_> {
    fn find(&self, name: &str) -> Option<&str> {
        self.0.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn get<T: Contents>(&self, name: &str) -> Result<T, Malformed> {
        T::from_text(self.find(name).ok_or_else(|| Malformed::new(self.0))?)
    }
}

trait Line: Sized {
    fn parse(fields: &Fields<'_>) -> Result<Self, Malformed>;
}

impl<T: Line> Contents for ByDevice<T> {
    fn from_text(text: &str) -> Result<ByDevice<T>, Malformed> {
        let mut found = BTreeMap::new();
        for line in text.lines() {
            // Kernels before 5.15 put devices that have nothing to say before one that has, without a newline.
            let Some(fields_at) = line.find('=') else { continue };
            let (devices, first) = line[..fields_at].rsplit_once(' ').ok_or_else(|| Malformed::new(line))?;
            let fields_at = fields_at - first.len();
            let device = devices.rsplit(' ').next().unwrap_or(devices);
            found.insert(device_number(device)?, T::parse(&Fields(line[fields_at..].trim_end()))?);
        }
        Ok(found)
    }
}

fn device_number(text: &str) -> Result<BlockDevice, Malformed> {
    text.parse().map_err(|_| Malformed::new(text))
}

/// `io.max` of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Read.
    pub read: Limit<BytesPerSec>,
    /// Written.
    pub write: Limit<BytesPerSec>,
    /// Reads.
    pub read_operations: Limit<Iops>,
    /// Writes.
    pub write_operations: Limit<Iops>,
}

impl Line for IoLimits {
    fn parse(fields: &Fields<'_>) -> Result<IoLimits, Malformed> {
        Ok(IoLimits {
            read: fields.get("rbps")?,
            write: fields.get("wbps")?,
            read_operations: fields.get("riops")?,
            write_operations: fields.get("wiops")?,
        })
    }
}

impl Setting for OfDevice<IoLimits> {
    fn text(&self) -> String {
        let OfDevice(device, limits) = self;
        format!(
            "{device} rbps={} wbps={} riops={} wiops={}",
            limits.read.text(),
            limits.write.text(),
            limits.read_operations.text(),
            limits.write_operations.text()
        )
    }
}

/// `io.weight`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoWeight {
    /// Where no other is given.
    pub default: Weight,
    /// Where one is.
    pub devices: BTreeMap<BlockDevice, Weight>,
}

impl Contents for IoWeight {
    fn from_text(text: &str) -> Result<IoWeight, Malformed> {
        let (mut default, mut devices) = (None, BTreeMap::new());
        for line in text.lines() {
            let (what, weight) = line.split_once(' ').ok_or_else(|| Malformed::new(line))?;
            let weight = <Weight as Contents>::from_text(weight)?;
            match what {
                "default" => default = Some(weight),
                device => drop(devices.insert(device_number(device)?, weight)),
            }
        }
        Ok(IoWeight { default: default.ok_or_else(|| Malformed::new(text))?, devices })
    }
}

/// What is written to `io.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetIoWeight {
    /// For every device that has none of its own.
    Default(Weight),
    /// For one device; `None`: the default again.
    Device(BlockDevice, Option<Weight>),
}

impl Setting for SetIoWeight {
    fn text(&self) -> String {
        match self {
            SetIoWeight::Default(weight) => format!("default {}", weight.get()),
            SetIoWeight::Device(device, Some(weight)) => format!("{device} {}", weight.get()),
            SetIoWeight::Device(device, None) => format!("{device} default"),
        }
    }
}

/// `io.stat` of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStat {
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

impl Line for IoStat {
    fn parse(fields: &Fields<'_>) -> Result<IoStat, Malformed> {
        // A policy may have put its own fields on the line, and the device have done nothing.
        let count = |name| fields.find(name).map_or(Ok(0), number);
        Ok(IoStat {
            read: count("rbytes")?,
            written: count("wbytes")?,
            reads: count("rios")?,
            writes: count("wios")?,
        })
    }
}

/// Who chose the parameters of io.cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// The kernel, by the kind of device.
    Auto,
    /// Whoever wrote them.
    User,
}

impl Contents for Control {
    fn from_text(text: &str) -> Result<Control, Malformed> {
        match text {
            "auto" => Ok(Control::Auto),
            "user" => Ok(Control::User),
            _ => Err(Malformed::new(text)),
        }
    }
}

impl Setting for Control {
    fn text(&self) -> String {
        match self {
            Control::Auto => "auto",
            Control::User => "user",
        }
        .into()
    }
}

/// Hundredths of a per cent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PerTenThousand(pub u32);

impl Contents for PerTenThousand {
    fn from_text(text: &str) -> Result<PerTenThousand, Malformed> {
        hundredths(text).map(PerTenThousand)
    }
}

impl Setting for PerTenThousand {
    fn text(&self) -> String {
        format!("{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

/// `io.cost.qos` of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostQos {
    /// Whether io.cost controls the device.
    pub enable: bool,
    /// Whose parameters these are. Those of `Auto` are not written.
    pub control: Control,
    /// The percentile of the latency of reads …
    pub read_percentile: PerTenThousand,
    /// … that should be below this.
    pub read_latency: Micros,
    /// The percentile of the latency of writes …
    pub write_percentile: PerTenThousand,
    /// … that should be below this.
    pub write_latency: Micros,
    /// How far the device may be slowed down, of the model's speed …
    pub min: PerTenThousand,
    /// … and sped up.
    pub max: PerTenThousand,
}

impl Line for CostQos {
    fn parse(fields: &Fields<'_>) -> Result<CostQos, Malformed> {
        Ok(CostQos {
            enable: fields.get("enable")?,
            control: fields.get("ctrl")?,
            read_percentile: fields.get("rpct")?,
            read_latency: fields.get("rlat")?,
            write_percentile: fields.get("wpct")?,
            write_latency: fields.get("wlat")?,
            min: fields.get("min")?,
            max: fields.get("max")?,
        })
    }
}

impl Setting for OfDevice<CostQos> {
    fn text(&self) -> String {
        let OfDevice(device, qos) = self;
        let head = format!("{device} enable={} ctrl={}", qos.enable.text(), qos.control.text());
        match qos.control {
            // Any parameter would make it the user's.
            Control::Auto => head,
            Control::User => format!(
                "{head} rpct={} rlat={} wpct={} wlat={} min={} max={}",
                qos.read_percentile.text(),
                qos.read_latency.0,
                qos.write_percentile.text(),
                qos.write_latency.0,
                qos.min.text(),
                qos.max.text()
            ),
        }
    }
}

/// `io.cost.model` of one device: the linear model, which is the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostModel {
    /// Whose parameters these are. Those of `Auto` are not written.
    pub control: Control,
    /// Bytes a second: read, written.
    pub bytes: [BytesPerSec; 2],
    /// Operations a second of 4 KiB in sequence: reads, writes.
    pub sequential: [Iops; 2],
    /// Operations a second of 4 KiB anywhere: reads, writes.
    pub random: [Iops; 2],
}

impl Line for CostModel {
    fn parse(fields: &Fields<'_>) -> Result<CostModel, Malformed> {
        if fields.find("model") != Some("linear") {
            return Err(Malformed::new(fields.0));
        }
        Ok(CostModel {
            control: fields.get("ctrl")?,
            bytes: [fields.get("rbps")?, fields.get("wbps")?],
            sequential: [fields.get("rseqiops")?, fields.get("wseqiops")?],
            random: [fields.get("rrandiops")?, fields.get("wrandiops")?],
        })
    }
}

impl Setting for OfDevice<CostModel> {
    fn text(&self) -> String {
        let OfDevice(device, model) = self;
        let head = format!("{device} ctrl={} model=linear", model.control.text());
        let part = |letter, index: usize| {
            let (bytes, sequential, random) =
                (model.bytes[index].0, model.sequential[index].0, model.random[index].0);
            format!("{letter}bps={bytes} {letter}seqiops={sequential} {letter}randiops={random}")
        };
        match model.control {
            Control::Auto => head,
            Control::User => format!("{head} {} {}", part('r', 0), part('w', 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SDA: BlockDevice = BlockDevice { major: 8, minor: 0 };
    const VDA: BlockDevice = BlockDevice { major: 254, minor: 16 };

    #[test]
    fn ceilings_by_device() {
        let text = "8:0 rbps=2097152 wbps=max riops=max wiops=120\n254:16 rbps=max wbps=1 riops=1 wiops=max";
        let found = ByDevice::<IoLimits>::from_text(text).unwrap();
        let sda = IoLimits {
            read: Limit::At(BytesPerSec(2_097_152)),
            write_operations: Limit::At(Iops(120)),
            ..IoLimits::default()
        };
        assert_eq!(found[&SDA], sda);
        assert_eq!(found[&VDA].write, Limit::At(BytesPerSec(1)));
        assert_eq!(ByDevice::<IoLimits>::from_text(""), Ok(BTreeMap::new()));
        assert_eq!(OfDevice(SDA, sda).text(), text.lines().next().unwrap());
        for broken in [
            "8:0 rbps=1",
            "8:0 rbps=-1 wbps=max riops=max wiops=max",
            "8 rbps=1 wbps=1 riops=1 wiops=1",
            "=",
            "a=b",
        ] {
            assert!(ByDevice::<IoLimits>::from_text(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn weights_by_device() {
        let found = IoWeight::from_text("default 100\n8:0 300").unwrap();
        assert_eq!(found.default, Weight::DEFAULT);
        assert_eq!(found.devices[&SDA].get(), 300);
        assert!(IoWeight::from_text("8:0 300").is_err() && IoWeight::from_text("default 0").is_err());
        assert!(IoWeight::from_text("100").is_err());
        assert_eq!(SetIoWeight::Default(Weight::DEFAULT).text(), "default 100");
        assert_eq!(SetIoWeight::Device(SDA, None).text(), "8:0 default");
        assert_eq!(SetIoWeight::Device(SDA, Some(Weight::DEFAULT)).text(), "8:0 100");
    }

    #[test]
    fn io_stat_has_a_line_for_each_device() {
        let text = "254:16 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n\
                    8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0 cost.vrate=100.00 cost.usage=10";
        let found = ByDevice::<IoStat>::from_text(text).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[&VDA], IoStat { read: 4096, written: 8192, reads: 1, writes: 2 });
        assert_eq!(found[&SDA], IoStat { read: 1, written: 2, reads: 3, writes: 4 });
        let joined = ByDevice::<IoStat>::from_text("7:1 7:0 8:0 rbytes=1 wbytes=2 rios=3 wios=4").unwrap();
        assert_eq!(joined.keys().collect::<Vec<_>>(), [&SDA]);
        assert!(ByDevice::<IoStat>::from_text("8:0 rbytes=many").is_err());
    }

    #[test]
    fn the_files_of_io_cost() {
        let qos = "8:0 enable=1 ctrl=user rpct=95.00 rlat=75000 wpct=95.50 wlat=150000 min=50.00 max=150.00";
        let found = ByDevice::<CostQos>::from_text(qos).unwrap()[&SDA];
        assert_eq!((found.enable, found.write_percentile), (true, PerTenThousand(9550)));
        assert_eq!(OfDevice(SDA, found).text(), qos);
        let auto = CostQos { control: Control::Auto, ..found };
        assert_eq!(OfDevice(SDA, auto).text(), "8:0 enable=1 ctrl=auto");
        let model = "8:0 ctrl=user model=linear rbps=2706339840 rseqiops=89698 rrandiops=110036 \
                     wbps=1063126016 wseqiops=135560 wrandiops=130734";
        let found = ByDevice::<CostModel>::from_text(model).unwrap()[&SDA];
        assert_eq!(found.random, [Iops(110_036), Iops(130_734)]);
        assert_eq!(OfDevice(SDA, found).text(), model);
        assert!(ByDevice::<CostModel>::from_text(&model.replace("linear", "cubic")).is_err());
        assert!(ByDevice::<CostQos>::from_text(&qos.replace("95.00", "95")).is_err());
    }

    fn ceiling() -> impl Strategy<Value = Limit<u64>> {
        prop::option::of(1u64..u64::MAX).prop_map(|value| value.map_or(Limit::Unlimited, Limit::At))
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(major in 0u32..4096, minor in 0u32..1 << 20, ceilings in [ceiling(), ceiling(), ceiling(), ceiling()]) {
            let device = BlockDevice { major, minor };
            let limits = IoLimits {
                read: ceilings[0].map(BytesPerSec),
                write: ceilings[1].map(BytesPerSec),
                read_operations: ceilings[2].map(Iops),
                write_operations: ceilings[3].map(Iops),
            };
            let text = OfDevice(device, limits).text();
            prop_assert_eq!(ByDevice::<IoLimits>::from_text(&text), Ok(BTreeMap::from([(device, limits)])));
        }

        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}", fields in "[0-9]:[0-9] ([a-z]{1,4}=[0-9a-z.]{0,6} ?){0,4}") {
            for text in [text, fields] {
                let _ = (ByDevice::<IoLimits>::from_text(&text), ByDevice::<IoStat>::from_text(&text), IoWeight::from_text(&text));
                let _ = (ByDevice::<CostQos>::from_text(&text), ByDevice::<CostModel>::from_text(&text));
            }
        }
    }
}
