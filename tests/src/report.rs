//! What a run prints of its cases, and what that says when it is read again: a machine that fell silent is started again, and
//! its tests go on with the cases that are not done.
//!
//! Only whole lines count, of cases that the run has, and a case is done only if it says `ok` or `FAIL`: its last line, or its
//! last but for the reason.

use std::collections::{BTreeMap, BTreeSet};

use crate::case::Verdict;

/// The lines of a case that has ended. What could not be tried comes before the result.
#[must_use]
pub fn of(name: &str, seconds: f32, verdict: &Verdict) -> String {
    let skip = |why: &String| format!("skip  {name}: {why}\n");
    match verdict {
        Verdict::Passed(without) => {
            let skips: String = without.iter().map(skip).collect();
            format!("{skips}ok    {name} ({seconds:.1} s)\n")
        }
        Verdict::Skipped(why) => skip(why),
        Verdict::Failed(why) => {
            let why = why.replace('\n', "\n      ");
            format!("FAIL  {name} ({seconds:.1} s)\n      {why}\n")
        }
    }
}

/// The line before a case that failed is tried once more.
#[must_use]
pub fn again(name: &str) -> String {
    format!("again {name}\n")
}

/// The line before a case is run again that the machine fell silent in.
#[must_use]
pub fn silent(name: &str) -> String {
    format!("silent {name}: the machine fell silent in it; it is run again, alone\n")
}

/// How a case was done before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It passed.
    Passed {
        /// So many of its parts could not be tried.
        without: usize,
    },
    /// It failed, and has not been tried again.
    Failed,
    /// It failed, and passed alone.
    Flaky {
        /// So many of its parts could not be tried.
        without: usize,
    },
    /// It failed, and failed alone.
    FailedAlone,
}

/// What a run had printed when its machine fell silent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// The cases that are done.
    pub done: BTreeMap<String, Done>,
    /// Those that were skipped as a whole, or were about to be done: they are run again.
    skipped: BTreeMap<String, usize>,
    /// The case that was being tried again.
    again: Option<String>,
    /// There was such a run.
    ran: bool,
}

/// Reads what a run has printed, as far as it came; `known` are the cases it had.
#[must_use]
pub fn read(text: &str, known: &BTreeSet<&str>) -> Before {
    let mut before = Before {
        ran: true,
        ..Before::default()
    };
    let whole = text.split_inclusive('\n');
    for line in whole.filter_map(|line| line.strip_suffix('\n')) {
        let Some((word, rest)) = line.split_at_checked(6) else {
            continue;
        };
        let end = if word == "skip  " { ": " } else { " (" };
        let name = rest.split_once(end).map_or(rest, |(name, _)| name);
        if known.contains(name) {
            before.line(word, name);
        }
    }
    before
}

impl Before {
    fn line(&mut self, word: &str, name: &str) {
        let alone = self.again.as_deref() == Some(name);
        let without = self.skipped.get(name).copied().unwrap_or(0);
        let done = match word {
            "ok    " if alone => Done::Flaky { without },
            "ok    " => Done::Passed { without },
            "FAIL  " if alone => Done::FailedAlone,
            "FAIL  " => Done::Failed,
            "again " => {
                self.again = Some(name.to_owned());
                return;
            }
            "skip  " => {
                self.skipped.insert(name.to_owned(), without + 1);
                return;
            }
            _ => return,
        };
        if alone {
            self.again = None;
        }
        self.skipped.remove(name);
        self.done.insert(name.to_owned(), done);
    }

    /// The cases the machine fell silent in, of all in their order, of which so many ran at once.
    #[must_use]
    pub fn silent_in<'a>(
        &'a self,
        cases: impl Iterator<Item = &'a str>,
        jobs: usize,
    ) -> Vec<&'a str> {
        if !self.ran {
            return Vec::new();
        }
        if let Some(again) = &self.again {
            return vec![again];
        }
        let left = cases
            .filter(|name| !self.done.contains_key(*name) && !self.skipped.contains_key(*name));
        left.take(jobs).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASES: [&str; 6] = ["a/one", "a/two", "a/three", "a/four", "a/five", "a/six"];

    fn read_of(text: &str) -> Before {
        read(text, &CASES.into())
    }

    fn printed() -> String {
        let parts = vec!["one part (x)".to_owned(), "another: part".to_owned()];
        let failed = Verdict::Failed("status 1\nok    a/five (0.1 s)\nagain a/one".to_owned());
        [
            of("a/one", 0.25, &Verdict::Passed(parts)),
            of(
                "a/two",
                10.0,
                &Verdict::Skipped("no such program".to_owned()),
            ),
            of("a/three", 1.0, &failed),
            of("a/four", 1.0, &Verdict::Passed(Vec::new())),
        ]
        .concat()
    }

    #[test]
    fn what_was_printed_says_what_is_done() {
        let before = read_of(&format!("host: npt\n{}", printed()));
        let done = [
            ("a/one", Done::Passed { without: 2 }),
            ("a/three", Done::Failed),
            ("a/four", Done::Passed { without: 0 }),
        ];
        let done = done.map(|(name, done)| (name.to_owned(), done));
        assert_eq!(before.done, done.into());
        assert_eq!(before.silent_in(CASES.into_iter(), 1), ["a/five"]);
        assert_eq!(before.silent_in(CASES.into_iter(), 9), ["a/five", "a/six"]);
    }

    #[test]
    fn wherever_it_ends_only_what_was_said_is_done() {
        let whole = printed();
        let all = read_of(&whole).done;
        for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
            let before = read_of(&whole[..end]);
            for (name, done) in &before.done {
                assert_eq!(all.get(name), Some(done), "{:?}", &whole[..end]);
                let last = whole[..end].rfind(&format!("{name} ("));
                assert!(last.is_some_and(|at| whole[at..end].contains('\n')));
            }
        }
        assert_eq!(read_of("ok    a/one (0.1 s)").done, BTreeMap::new());
    }

    #[test]
    fn cases_that_nobody_knows_are_not_done() {
        let before =
            read_of("ok    b/one (1.0 s)\nok    a/on (1.0 s)\nok   a/one (1.0 s)\nnot ok\n\n");
        assert_eq!(before.done, BTreeMap::new());
        assert_eq!(before.silent_in(CASES.into_iter(), 1), ["a/one"]);
    }

    #[test]
    fn a_case_that_failed_twice_stays_failed() {
        let failed = |name| of(name, 1.0, &Verdict::Failed("why".to_owned()));
        let passed = |name| of(name, 1.0, &Verdict::Passed(Vec::new()));
        let mut text = ["a/one", "a/two", "a/three"].map(failed).concat();
        text += &CASES[3..].iter().copied().map(passed).collect::<String>();
        text += &[
            again("a/one"),
            failed("a/one"),
            again("a/two"),
            passed("a/two"),
        ]
        .concat();
        text += &again("a/three");
        let before = read_of(&text);
        assert_eq!(before.done["a/one"], Done::FailedAlone);
        assert_eq!(before.done["a/two"], Done::Flaky { without: 0 });
        assert_eq!(before.done["a/three"], Done::Failed);
        assert_eq!(before.silent_in(CASES.into_iter(), 2), ["a/three"]);
    }

    #[test]
    fn without_a_run_before_nothing_was_silent() {
        let none = Before::default().silent_in(CASES.into_iter(), 1).len();
        assert_eq!(none, 0);
    }
}
