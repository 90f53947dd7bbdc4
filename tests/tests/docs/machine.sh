# Makes of a shell in namespaces of its own a machine on which nothing runs: with the paths that pages name, and none of the
# real machine's state behind them. Variables: DIRECTORY, BIN_DIR, BPF_OBJECT, ETCD, NVML, V1 (controllers); what stages add has
# REPOSITORY besides.
set -eu
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=755 none /run
for controller in $V1; do
    mkdir -p "/run/cgroup/$controller"
    mount -t cgroup -o "$controller" none "/run/cgroup/$controller"
done
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
mount -t tmpfs -o mode=755 none /var/lib
cp -a /etc /run/etc
mount --bind /run/etc /etc
mkdir /etc/shaper
printf '127.0.0.1 localhost n1 broker.lan ca.lan\n127.0.0.1 broker1\n127.0.0.2 broker2\n127.0.0.3 broker3\n' > /etc/hosts
echo n1 > /proc/sys/kernel/hostname
ip link set lo up

# Where every user finds the programs, wherever they were built.
mkdir /run/bin /run/lib
for program in shaper shaper-agent shaper-authority shaper-broker shaper-launch shaper-opener shaper-warden test-load; do
    touch "/run/bin/$program"
    mount --bind "$BIN_DIR/$program" "/run/bin/$program"
done
touch /run/bin/etcd
mount --bind "$ETCD" /run/bin/etcd
cp "$BPF_OBJECT" /run/bin/shaper.bpf.o
cp "$NVML" /run/lib/libnvidia-ml.so.1

# The root of cgroup v2 hands down its controllers as long as nobody is in it.
mkdir /sys/fs/cgroup/shell
echo $$ > /sys/fs/cgroup/shell/cgroup.procs

# What stands for a service of somebody else's.
mkdir -p /sys/fs/cgroup/system.slice/nginx.service
(echo "$BASHPID" > /sys/fs/cgroup/system.slice/nginx.service/cgroup.procs && exec sleep 3600) &
disown

cd "$DIRECTORY"
printf '#!/bin/sh\necho epoch 1\nexec /run/bin/test-load tick 36000 0 > /dev/null\n' > train
cp train backup.sh
chmod 755 train backup.sh
printf 'print("done")\n' | tee worker.py > load.py
# What runs them matters little.
command -v python3 > /dev/null || ln -s /bin/true /run/bin/python3

export PATH="/run/bin:$PATH" HOME="$DIRECTORY" LD_LIBRARY_PATH=/run/lib SHAPER_FAKE_NVML="$DIRECTORY/.cards" TERM=xterm NO_COLOR=1
unset BIN_DIR BPF_OBJECT ETCD NVML V1 DIRECTORY
set +eu
