//! What stands behind the `?` of an address.

/// Names and values, decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads it. What is no text is left out.
    pub(super) fn parse(text: &str) -> Query {
        let pairs = text.split('&').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((decoded(name)?, decoded(value)?)).filter(|(_, value)| !value.is_empty())
        });
        Query(pairs.collect())
    }

    /// The first value of this name; an empty one is none.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    /// A number of this name.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_queries_are_decoded_and_what_is_no_text_is_left_out() {
        let query = Query::parse("q=a%20b%2F%3Cx%3E&phase=&before=17&bad=%ff&bad=%f&c=d+e&novalue");
        assert_eq!(query.get("q"), Some("a b/<x>"));
        assert_eq!(query.get("c"), Some("d e"));
        assert_eq!(query.number("before"), Some(17));
        for none in ["phase", "bad", "novalue", "other"] {
            assert_eq!(query.get(none), None, "{none}");
        }
        assert_eq!(query.number("q"), None);
    }
}
