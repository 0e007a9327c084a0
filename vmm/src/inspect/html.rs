//! A guest's memory as one page that needs nothing else: the data is in it.

use super::Inspection;

/// The page without its data.
const PAGE: &str = include_str!("page.html");
/// Where the data goes.
const PLACE: &str = "/*DATA*/null";

/// The page.
///
/// # Errors
/// The counters cannot be written as JSON: our bug.
pub fn render(what: &Inspection) -> serde_json::Result<String> {
    // Inside a script element: no name of a guest's may end it.
    let data = serde_json::to_string(what)?
        .replace('<', "\\u003c")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029");
    Ok(PAGE.replacen(PLACE, &data, 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::tests::example;

    #[test]
    fn data_cannot_leave_its_script() {
        let mut what = example();
        what.processes[0].name = "</script><img src=x>".to_owned();
        let page = render(&what).unwrap();
        assert!(!page.contains("<img src=x>"));
        assert!(page.contains("\\u003c/script>"));
        assert!(!page.contains(PLACE));
    }

    #[test]
    fn page_asks_for_nothing_from_elsewhere() {
        for word in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }
}
