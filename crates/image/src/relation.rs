//! Relations between packages, as the fields `Depends`, `Conflicts` and `Provides` write them
//! (deb-policy 7.1): `a (>= 1.2) | b:any, c`.

/// How a version is compared (deb-policy 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `<<`
    Earlier,
    /// `<=` (and the old `<`)
    EarlierOrEqual,
    /// `=`
    Equal,
    /// `>=` (and the old `>`)
    LaterOrEqual,
    /// `>>`
    Later,
}

/// A package by name, perhaps in some versions only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The name, of a package or of what packages provide.
    pub name: &'a str,
    /// Which versions; all if `None`.
    pub version: Option<(Comparison, &'a str)>,
}

impl<'a> Relation<'a> {
    /// Reads one alternative; `None` for what is empty, malformed, or of another architecture than amd64.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim();
        let end = text.find([' ', '\t', '\n', '(', '[', '<']).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let name = match name.split_once(':') {
            None => name,
            Some((name, "any" | "native" | "amd64" | "all")) => name,
            Some(_) => return None,
        };
        if name.is_empty() {
            return None;
        }
        let rest = rest.trim_start();
        let Some(inside) = rest.strip_prefix('(') else {
            return Some(Self { name, version: None });
        };
        let inside = inside.split(')').next()?.trim();
        let digits = inside.find(|c: char| !"<>=".contains(c))?;
        let (sign, version) = inside.split_at(digits);
        let comparison = match sign {
            "<<" => Comparison::Earlier,
            "<=" | "<" => Comparison::EarlierOrEqual,
            "=" => Comparison::Equal,
            ">=" | ">" => Comparison::LaterOrEqual,
            ">>" => Comparison::Later,
            _ => return None,
        };
        Some(Self { name, version: Some((comparison, version.trim())) })
    }

    /// Whether a package of this version is meant.
    pub fn admits(&self, version: &str) -> bool {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let Some((comparison, wanted)) = self.version else { return true };
        let parse = |v: &str| v.parse::<debversion::Version>();
        let (Ok(have), Ok(wanted)) = (parse(version), parse(wanted)) else { return false };
        let order = have.cmp(&wanted);
        match comparison {
            Comparison::Earlier => order == Less,
            Comparison::EarlierOrEqual => order != Greater,
            Comparison::Equal => order == Equal,
            Comparison::LaterOrEqual => order != Less,
            Comparison::Later => order == Greater,
        }
    }
}

impl std::fmt::Display for Relation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)?;
        let Some((comparison, version)) = self.version else { return Ok(()) };
        let sign = match comparison {
            Comparison::Earlier => "<<",
            Comparison::EarlierOrEqual => "<=",
            Comparison::Equal => "=",
            Comparison::LaterOrEqual => ">=",
            Comparison::Later => ">>",
        };
        write!(f, " ({sign} {version})")
    }
}

/// The groups of a field: of each, one alternative. Groups of which nothing can be read are left out.
pub fn groups(text: &str) -> impl Iterator<Item = Vec<Relation<'_>>> {
    text.split(',').filter_map(|group| {
        let alternatives: Vec<_> = group.split('|').filter_map(Relation::parse).collect();
        (!alternatives.is_empty()).then_some(alternatives)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_read() {
        let all: Vec<Vec<String>> = groups("a (>= 1:1.2~x) | b:any, c(<<2) [amd64] <!nocheck>,, d:i386, e:i386|f")
            .map(|g| g.iter().map(ToString::to_string).collect())
            .collect();
        assert_eq!(all, [vec!["a (>= 1:1.2~x)", "b"], vec!["c (<< 2)"], vec!["f"]]);
        assert_eq!(groups("x (~ 1), y (").count(), 0);
    }

    #[test]
    fn versions_are_compared_as_debian_does() {
        let admits = |relation: &str, version: &str| Relation::parse(relation).unwrap().admits(version);
        assert!(admits("a", "anything"));
        assert!(admits("a (>= 1.9)", "1.10") && !admits("a (>= 1.10)", "1.9"));
        assert!(admits("a (<< 2)", "2~rc1") && !admits("a (<< 2)", "2"));
        assert!(admits("a (= 1-1)", "1-1") && !admits("a (= 1-1)", "1-1+b1"));
        assert!(admits("a (>> 9)", "1:0") && !admits("a (<= 9)", "1:0"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".{0,100}") {
            for group in groups(&text) {
                for relation in group {
                    relation.admits("1.0");
                }
            }
        }
    }
}
