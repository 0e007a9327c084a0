//! What is tested: a table of cases, each one launch and what must come of it, or a function for
//! what does not fit that.

use std::fmt;
use std::time::Duration;

use rustix::process::Signal;

use crate::context::{Context, shorten};
use crate::host::Host;
use crate::process::{Output, find_program};

/// One program, started once.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Options of `vmm run`.
    pub options: Vec<String>,
    /// The program. In all words `{work}` is the case's folder, `{programs}` that of the guest
    /// test programs.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Others, in the rig, where the full amount would take too long.
    pub rig_args: Option<Vec<String>>,
    /// Other options, in the rig: a smaller machine for a smaller amount.
    pub rig_options: Option<Vec<String>>,
    /// Its standard input.
    pub stdin: Vec<u8>,
    /// A signal for the VMM while it runs.
    pub signal: Option<(Duration, Signal)>,
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|&w| w.to_owned()).collect()
}

impl Launch {
    /// A program with arguments.
    #[must_use]
    pub fn new(program: &str, args: &[&str]) -> Self {
        Self {
            program: program.to_owned(),
            args: words(args),
            ..Self::default()
        }
    }

    /// A line for the machine's own shell, with the machine's root as the guest's.
    #[must_use]
    pub fn shell(line: &str) -> Self {
        Self::new("/bin/sh", &["-c", line]).options(&["--root", "/", "--workdir", "{work}"])
    }

    /// Adds options.
    #[must_use]
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(words(options));
        self
    }

    /// Sets standard input.
    #[must_use]
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.stdin = input.into();
        self
    }

    /// Sets other arguments for the rig.
    #[must_use]
    pub fn in_rig(mut self, args: &[&str]) -> Self {
        self.rig_args = Some(words(args));
        self
    }

    /// Sets other options for the rig.
    #[must_use]
    pub fn options_in_rig(mut self, options: &[&str]) -> Self {
        self.rig_options = Some(words(options));
        self
    }

    /// Sends the VMM a signal after a while.
    #[must_use]
    pub fn signal(mut self, after: Duration, signal: Signal) -> Self {
        self.signal = Some((after, signal));
        self
    }
}

/// What must come of a launch.
#[derive(Clone, Debug)]
pub enum Expect {
    /// The same standard output and status as natively.
    LikeNative,
    /// TAP lines, all `ok`, and status 0.
    Tap,
    /// This status; nothing about the output.
    Status(i32),
    /// This status and standard output.
    Exactly(i32, String),
    /// The VMM refuses: one of these statuses, nothing on standard output, one line on standard
    /// error that holds the text.
    Refused(Vec<i32>, String),
}

/// What a function case gives.
pub type Checked = Result<Verdict, String>;

/// How a case is done.
pub enum Body {
    /// One launch.
    Launch(Box<Launch>, Expect),
    /// Anything else.
    Function(fn(&Context) -> Checked),
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Launch(launch, expect) => {
                f.debug_tuple("Launch").field(launch).field(expect).finish()
            }
            Self::Function(_) => f.write_str("Function"),
        }
    }
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As expected, with the parts that could not be tried and why.
    Passed(Vec<String>),
    /// Not tried, and why.
    Skipped(String),
    /// Otherwise than expected.
    Failed(String),
}

/// The ordinary success.
pub const PASSED: Verdict = Verdict::Passed(Vec::new());

/// Which hosts a case is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Each that has KVM.
    EveryKvm,
    /// Only where there is no KVM.
    NoKvm,
}

/// One test.
#[derive(Debug)]
pub struct Case {
    /// `group/name`.
    pub name: String,
    /// Where.
    pub on: On,
    /// Programs of the machine without which it is skipped.
    pub needs: Vec<&'static str>,
    /// Killed after this long, on a machine that is not emulated.
    pub timeout: Duration,
    /// What is done.
    pub body: Body,
    /// Says something else, or nothing, on Linux itself.
    pub not_native: Option<&'static str>,
    /// It is about nothing that depends on how KVM pages a guest's memory.
    pub any_paging: bool,
}

impl Case {
    /// A launch.
    #[must_use]
    pub fn new(name: &str, launch: Launch, expect: Expect) -> Self {
        Self {
            name: name.to_owned(),
            on: On::EveryKvm,
            needs: Vec::new(),
            timeout: Duration::from_secs(60),
            body: Body::Launch(Box::new(launch), expect),
            not_native: None,
            any_paging: false,
        }
    }

    /// A function.
    #[must_use]
    pub fn function(name: &str, body: fn(&Context) -> Checked) -> Self {
        let mut case = Self::new(name, Launch::default(), Expect::Tap);
        case.body = Body::Function(body);
        case.not_native = Some("it looks at the VMM");
        case
    }

    /// Restricts the hosts.
    #[must_use]
    pub fn on(mut self, on: On) -> Self {
        self.on = on;
        self
    }

    /// It is about nothing that depends on how KVM pages a guest's memory: where it is tried on both kinds of emulated
    /// machine, one of them is enough.
    #[must_use]
    pub fn any_paging(mut self) -> Self {
        self.any_paging = true;
        self
    }

    /// Needs programs of the machine.
    #[must_use]
    pub fn needs(mut self, programs: &[&'static str]) -> Self {
        self.needs.extend(programs);
        self
    }

    /// Sets the time limit, in seconds.
    #[must_use]
    pub fn seconds(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// Cannot be tried on Linux itself.
    #[must_use]
    pub fn not_native(mut self, why: &'static str) -> Self {
        self.not_native = Some(why);
        self
    }

    /// Can be tried on Linux itself after all.
    #[must_use]
    pub fn native_too(mut self) -> Self {
        self.not_native = None;
        self
    }

    /// Sets other arguments of its launch for the rig.
    #[must_use]
    pub fn in_rig(mut self, args: &[&str]) -> Self {
        if let Body::Launch(launch, expect) = self.body {
            self.body = Body::Launch(Box::new(launch.in_rig(args)), expect);
        }
        self
    }

    /// Whether it says anything about this host: the others are not skips.
    #[must_use]
    pub fn is_for(&self, host: Host) -> bool {
        (self.on == On::NoKvm) == (host == Host::NoKvm)
    }

    /// Why it is not tried on this host, if it is not.
    #[must_use]
    pub fn skip_on(&self, host: Host) -> Option<String> {
        let missing = self.needs.iter().find(|name| find_program(name).is_none());
        if let (Host::Native, Some(why)) = (host, self.not_native) {
            return Some(why.to_owned());
        }
        missing.map(|name| format!("{name} is not installed"))
    }

    /// Runs it.
    #[must_use]
    pub fn run(&self, context: &Context) -> Verdict {
        let checked = match &self.body {
            Body::Function(body) => body(context),
            Body::Launch(launch, expect) if context.setup.host == Host::Native => context
                .native(launch)
                .and_then(|o| expect_native(expect, &o)),
            Body::Launch(launch, expect) => check_launch(context, launch, expect),
        };
        checked.unwrap_or_else(Verdict::Failed)
    }
}

fn expect_native(expect: &Expect, output: &Output) -> Checked {
    match expect {
        Expect::LikeNative => oracle(output).map(|()| PASSED),
        other => check(other, output),
    }
}

/// An oracle that says nothing proves nothing.
fn oracle(native: &Output) -> Result<(), String> {
    if matches!(native.status, 126 | 127) || (native.status == 0 && native.stdout.is_empty()) {
        return Err(format!(
            "on Linux itself: status {}, {}",
            native.status,
            native.err()
        ));
    }
    Ok(())
}

fn check_launch(context: &Context, launch: &Launch, expect: &Expect) -> Checked {
    let output = context.run(launch)?;
    if let Expect::LikeNative = expect {
        let native = context.native(launch)?;
        oracle(&native)?;
        let wanted = Expect::Exactly(native.status, native.out());
        return check(&wanted, &output);
    }
    check(expect, &output)
}

/// Compares an output with what was expected.
///
/// # Errors
/// In what they differ.
pub fn check(expect: &Expect, output: &Output) -> Checked {
    let said = || format!("stderr:\n{}", shorten(&output.err(), 20));
    let status = |want: i32| {
        if output.status == want {
            return Ok(());
        }
        Err(format!(
            "status {}, not {want}; stdout:\n{}\n{}",
            output.status,
            shorten(&output.out(), 20),
            said()
        ))
    };
    match expect {
        Expect::Tap => check_tap(output),
        Expect::Status(want) => status(*want).map(|()| PASSED),
        Expect::Exactly(want, _) if output.status != *want => status(*want).map(|()| PASSED),
        Expect::Exactly(_, want) if output.out() != *want => Err(format!(
            "standard output differs: want ({} bytes)\n{}\ngot ({} bytes)\n{}\n{}",
            want.len(),
            shorten(want, 12),
            output.stdout.len(),
            shorten(&output.out(), 12),
            said()
        )),
        Expect::Exactly(..) => Ok(PASSED),
        Expect::Refused(statuses, text) => {
            let err = output.err();
            if !statuses.contains(&output.status) || !output.stdout.is_empty() {
                return Err(format!(
                    "status {}, want one of {statuses:?} and no output; stdout: {}\n{}",
                    output.status,
                    output.out(),
                    said()
                ));
            }
            if err.lines().count() != 1 || !err.contains(text.as_str()) {
                return Err(format!("want one line on stderr with `{text}`; {}", said()));
            }
            Ok(PASSED)
        }
        Expect::LikeNative => Ok(PASSED),
    }
}

fn check_tap(output: &Output) -> Checked {
    let text = output.out();
    let lines = || {
        text.lines()
            .filter(|l| l.starts_with("ok ") || l.starts_with("not ok "))
    };
    let bad: Vec<&str> = text
        .lines()
        .filter(|l| !l.starts_with("ok ") && !l.starts_with("1.."))
        .collect();
    let plan = text
        .lines()
        .find_map(|l| l.strip_prefix("1.."))
        .and_then(|n| n.parse().ok());
    if output.status != 0 || !bad.is_empty() || plan != Some(lines().count()) || plan == Some(0) {
        return Err(format!(
            "status {}, {} results of {plan:?}\n{}\nstderr:\n{}",
            output.status,
            lines().count(),
            bad.join("\n"),
            shorten(&output.err(), 12)
        ));
    }
    let skipped = lines()
        .filter_map(|l| {
            let (name, why) = l.split_once(" # SKIP ")?;
            Some(format!(
                "{}: {why}",
                name.split_once(" - ").map_or(name, |(_, n)| n)
            ))
        })
        .collect();
    Ok(Verdict::Passed(skipped))
}
