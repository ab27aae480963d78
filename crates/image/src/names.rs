//! Names that were nearly right: what a user who mistyped may have meant.

/// The most changes (letters added, left out, replaced or swapped) between a name and what is suggested for it.
const MOST_CHANGES: usize = 2;

/// The most names that are suggested.
const MOST_NAMES: usize = 3;

/// Which of `names` differ least from `wrong`, the nearest first; none if all differ much.
pub fn nearest<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    // Of a short name nothing would be left.
    let most = MOST_CHANGES.min(wrong.chars().count() / 3);
    let mut found: Vec<(usize, &str)> = names
        .filter(|name| name.len().abs_diff(wrong.len()) <= most)
        .map(|name| (strsim::osa_distance(wrong, name), name))
        .filter(|(distance, _)| *distance <= most)
        .collect();
    found.sort_unstable();
    found.dedup();
    let best = found.first().map_or(0, |(distance, _)| *distance);
    found.into_iter().take_while(|(distance, _)| *distance == best).take(MOST_NAMES).map(|(_, name)| name).collect()
}

/// The names as the end of a sentence that says what there is not; empty if there are none.
pub fn did_you_mean(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        names => format!(" (did you mean {}?)", names.join(" or ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_are_found() {
        let names = ["debian", "nginx", "nginx-light", "redis-server", "vim", "busybox"];
        let near = |wrong| nearest(wrong, names.into_iter());
        assert_eq!(near("debain"), ["debian"]);
        assert_eq!(near("ngnix"), ["nginx"]);
        assert_eq!(near("vin"), ["vim"]);
        assert_eq!(near("x"), [""; 0]);
        assert_eq!(near("postgresql"), [""; 0]);
        assert_eq!(did_you_mean(&near("debain")), " (did you mean debian?)");
        assert_eq!(did_you_mean(&[]), "");
    }
}
