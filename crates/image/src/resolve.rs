//! Which packages make a whole system: what is asked for and all it depends on, in versions that fit together.
//!
//! Of one suite there is one version of each package (the newest), so there is nothing to choose but among
//! alternatives and providers. The choice is APT's: what is chosen already, else the first alternative that can be had,
//! the package of that name before those that provide it. It is never taken back; where that leads into a conflict the user is told,
//! and can name the package he wants.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::error::{Error, Result};
use crate::relation::Relation;
use crate::repository::{Package, Repository};

/// Packages chosen so far.
struct Chosen<'a> {
    packages: BTreeMap<&'a str, &'a Package>,
    /// By a name that they have or provide.
    by_name: HashMap<&'a str, Vec<&'a Package>>,
    /// Conflicts, by the name that may not be there, with the one who says so.
    conflicts: HashMap<&'a str, Vec<(Relation<'a>, &'a Package)>>,
}

impl<'a> Chosen<'a> {
    fn add(&mut self, package: &'a Package) -> bool {
        if self.packages.insert(&package.name, package).is_some() {
            return false;
        }
        for name in std::iter::once(package.name.as_str()).chain(package.provides().map(|p| p.name)) {
            self.by_name.entry(name).or_default().push(package);
        }
        for relation in package.conflicts() {
            self.conflicts.entry(relation.name).or_default().push((relation, package));
        }
        true
    }

    fn has(&self, relation: &Relation<'_>) -> bool {
        self.by_name.get(relation.name).into_iter().flatten().any(|p| p.satisfies(relation))
    }

    /// A chosen package that cannot stand beside `package`.
    fn conflict(&self, package: &Package) -> Option<&'a Package> {
        let theirs = std::iter::once(package.name.as_str())
            .chain(package.provides().map(|p| p.name))
            .filter_map(|name| self.conflicts.get(name))
            .flatten()
            .find(|(relation, by)| by.name != package.name && package.satisfies(relation))
            .map(|(_, by)| *by);
        theirs.or_else(|| {
            package.conflicts().find_map(|relation| {
                let beside = self.by_name.get(relation.name).into_iter().flatten();
                beside.copied().find(|p| p.name != package.name && p.satisfies(&relation))
            })
        })
    }
}

/// The packages and all they depend on, sorted by name; with `recommends`, also what they recommend, where it can be had.
///
/// # Errors
/// [`Error::NoPackage`] for a name that the suite does not have, [`Error::Unmet`] for a package that cannot be
/// installed: something it needs cannot be had, or another that is needed conflicts with it.
pub fn resolve<'a>(repository: &'a Repository, names: &[&str], recommends: bool) -> Result<Vec<&'a Package>> {
    let mut chosen = Chosen { packages: BTreeMap::new(), by_name: HashMap::new(), conflicts: HashMap::new() };
    let mut todo = VecDeque::new();
    let unmet = |package: &Package, reason: String| Error::Unmet {
        package: package.name.clone(),
        suite: repository.suite().to_owned(),
        reason,
    };
    for name in names {
        let package = repository.package(name)?;
        if let Some(other) = chosen.conflict(package) {
            return Err(unmet(package, format!("it conflicts with {}", other.name)));
        }
        if chosen.add(package) {
            todo.push_back(package);
        }
    }
    // What is recommended comes last: it must not take the place of what is needed.
    let mut later: VecDeque<&Package> = VecDeque::new();
    loop {
        while let Some(package) = todo.pop_front() {
            for group in package.depends() {
                if group.iter().any(|r| chosen.has(r)) {
                    continue;
                }
                let all: Vec<&Package> = group.iter().flat_map(|r| repository.candidates(r)).collect();
                let Some(found) = all.iter().copied().find(|p| chosen.conflict(p).is_none()) else {
                    let wanted: Vec<String> = group.iter().map(ToString::to_string).collect();
                    let wanted = wanted.join(" | ");
                    let blocked = all.first().and_then(|p| Some((p, chosen.conflict(p)?)));
                    return Err(unmet(
                        package,
                        match blocked {
                            Some((p, other)) => format!("it needs {}, which conflicts with {}", p.name, other.name),
                            None => format!("it needs {wanted}, which the suite does not have"),
                        },
                    ));
                };
                chosen.add(found);
                todo.push_back(found);
            }
            if recommends {
                later.push_back(package);
            }
        }
        let Some(package) = later.pop_front() else { break };
        for group in package.recommends() {
            if group.iter().any(|r| chosen.has(r)) {
                continue;
            }
            let fits = |p: &&Package| chosen.conflict(p).is_none() && installable(repository, p);
            let found = group.iter().flat_map(|r| repository.candidates(r)).find(fits);
            if let Some(found) = found {
                chosen.add(found);
                todo.push_back(found);
            }
        }
    }
    Ok(chosen.packages.into_values().collect())
}

/// Whether each of its own dependencies can be had; those of them are not looked at.
fn installable(repository: &Repository, package: &Package) -> bool {
    package.depends().all(|group| group.iter().any(|r| !repository.candidates(r).is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::tests::{entry, repository};

    fn names(r: &Repository, wanted: &[&str]) -> Vec<String> {
        resolve(r, wanted, false).unwrap().iter().map(|p| p.name.clone()).collect()
    }

    fn error(r: &Repository, wanted: &[&str]) -> String {
        resolve(r, wanted, false).unwrap_err().to_string()
    }

    #[test]
    fn first_alternative_or_most_important_provider() {
        let r = repository(
            &[
                entry("a", "1", "Depends: gone (>= 1) | b:any, v\nPre-Depends: c (= 2)\n"),
                entry("b", "1", "Depends: a\n"),
                entry("c", "2", ""),
                entry("n", "1", "Provides: v\nPriority: optional\n"),
                entry("p", "1", "Provides: v (= 3), w\nPriority: standard\n"),
                entry("q", "1", "Depends: v\n"),
                entry("unused", "1", ""),
                entry("bad", "1", "Depends: nowhere | neither\n"),
            ]
            .concat(),
        );
        assert_eq!(names(&r, &["a"]), ["a", "b", "c", "p"]);
        // What is there already is taken, whatever its rank.
        assert_eq!(names(&r, &["n", "q"]), ["n", "q"]);
        assert!(error(&r, &["bad"]).contains("nowhere | neither"));
        assert!(error(&r, &["unusde"]).contains("did you mean unused?"));
        assert!(matches!(resolve(&r, &["x/../y"], false), Err(Error::BadName { .. })));
    }

    #[test]
    fn versions_must_fit() {
        let r = repository(
            &[
                entry("old", "1", "Depends: lib (>= 2)\n"),
                entry("good", "1", "Depends: lib (>= 2) | lib (<< 2)\n"),
                entry("lib", "1.9", ""),
                entry("virtual", "1", "Depends: v (>= 2)\n"),
                entry("p1", "1", "Provides: v\n"),
                entry("virtual2", "1", "Depends: w (>= 2)\n"),
                entry("p2", "1", "Provides: w (= 2.1)\n"),
            ]
            .concat(),
        );
        assert!(error(&r, &["old"]).contains("lib (>= 2)"));
        assert_eq!(names(&r, &["good"]), ["good", "lib"]);
        // A provided name without a version meets no relation with one.
        assert!(error(&r, &["virtual"]).contains("v (>= 2)"));
        assert_eq!(names(&r, &["virtual2"]), ["p2", "virtual2"]);
    }

    #[test]
    fn conflicts_are_avoided_or_told() {
        let r = repository(
            &[
                entry("mta", "1", "Depends: exim | postfix\n"),
                entry("exim", "1", "Provides: mail\nConflicts: mail\n"),
                entry("postfix", "1", "Provides: mail\nConflicts: mail\n"),
                entry("hates", "1", "Breaks: exim (<< 2)\n"),
                entry("needs", "1", "Depends: exim\n"),
            ]
            .concat(),
        );
        // Providing what one conflicts with oneself is no conflict.
        assert_eq!(names(&r, &["mta"]), ["exim", "mta"]);
        assert_eq!(names(&r, &["hates", "mta"]), ["hates", "mta", "postfix"]);
        assert!(error(&r, &["exim", "postfix"]).contains("conflicts with exim"));
        assert!(error(&r, &["hates", "needs"]).contains("needs exim, which conflicts with hates"));
    }

    #[test]
    fn recommended_where_it_can_be_had() {
        let r = repository(
            &[
                entry("a", "1", "Recommends: b, gone, broken | c\n"),
                entry("b", "1", "Recommends: d\n"),
                entry("broken", "1", "Depends: gone\n"),
                entry("c", "1", ""),
                entry("d", "1", ""),
            ]
            .concat(),
        );
        let all = resolve(&r, &["a"], true).unwrap();
        assert_eq!(all.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!(names(&r, &["a"]), ["a"]);
    }
}
