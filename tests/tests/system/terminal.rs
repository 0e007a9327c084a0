//! Job control and the rest of what a terminal does, typed by hand as it were.

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::host::Host;
use tests::terminal::{CTRL_BACKSLASH, CTRL_C, CTRL_D, CTRL_Z, Terminal};

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|&w| w.to_owned()).collect()
}

/// The command under the VMM; on Linux itself just the command.
fn guest(context: &Context, list: &[&str]) -> Vec<String> {
    let mut all = match context.setup.host {
        Host::Native => Vec::new(),
        Host::Kvm | Host::Npt | Host::Shadow | Host::NoKvm => {
            context.prefix(&words(&["--env", "PS1=ready> ", "--root", "/"]))
        }
    };
    if all.is_empty() {
        all.extend(words(&["/usr/bin/env", "PS1=ready> "]));
    }
    all.extend(words(list));
    all
}

const PROMPT: &str = "ready> ";

fn shell(context: &Context) -> Result<Terminal, String> {
    let mut terminal = Terminal::start(context, &guest(context, &["/bin/sh", "-i"]))?;
    terminal.expect(PROMPT)?;
    Ok(terminal)
}

/// The shell inside: stop a pipeline, look at it, let it go on, interrupt it.
fn stop_and_continue_inside(context: &Context) -> Checked {
    let mut t = shell(context)?;
    t.send("sleep 60 | cat\n")?;
    t.pause(500);
    t.until(CTRL_Z, "Stopped")?;
    t.expect(PROMPT)?;
    t.send("jobs\n")?;
    t.expect("sleep 60")?;
    t.expect(PROMPT)?;
    t.send("fg\n")?;
    t.expect("sleep 60")?;
    t.pause(500);
    t.until(CTRL_C, PROMPT)?;
    t.send("echo after=$?\n")?;
    t.expect("after=130")?;
    t.send("exit 4\n")?;
    t.ends_with(4)?;
    Ok(PASSED)
}

/// A stopped reader gets what is typed once it goes on, and a background one is stopped.
fn a_reader_in_the_foreground(context: &Context) -> Checked {
    let mut t = shell(context)?;
    t.send("cat\n")?;
    t.send("hello\n")?;
    t.expect("hello\r\nhello\r\n")?;
    t.until(CTRL_Z, "Stopped")?;
    t.expect(PROMPT)?;
    t.send("fg\n")?;
    t.expect("fg\r\ncat\r\n")?;
    // The shell has said so; what is typed now must not overtake it on the screen.
    t.pause(1000);
    t.send("again\n")?;
    t.expect("again\r\nagain\r\n")?;
    t.send(CTRL_D)?;
    t.expect(PROMPT)?;
    t.send("cat &\n")?;
    t.expect(PROMPT)?;
    t.until("jobs\n", "Stopped")?;
    t.send("kill %1; wait; exit 0\n")?;
    t.pause(300);
    t.send("exit 0\n")?;
    t.ends_with(0)?;
    Ok(PASSED)
}

/// The shell outside stops the whole VMM and lets it go on, and has it in the background.
fn stop_and_continue_outside(context: &Context) -> Checked {
    let line = "echo started; sleep 4; echo finished";
    let inner: Vec<String> = guest(context, &["/bin/sh", "-c"])
        .iter()
        .map(|w| format!("'{w}'"))
        .collect();
    let start = format!("{} '{line}'\n", inner.join(" "));
    let outer = words(&["/usr/bin/env", "PS1=outer> ", "/bin/sh", "-i"]);
    let mut t = Terminal::start(context, &outer)?;
    t.expect("outer> ")?;
    t.send(&start)?;
    t.expect("\nstarted")?;
    t.pause(300);
    t.until(CTRL_Z, "Stopped")?;
    t.expect("outer> ")?;
    t.send("fg\n")?;
    t.expect("\nfinished")?;
    t.expect("outer> ")?;
    t.send(&start)?;
    t.expect("\nstarted")?;
    t.pause(300);
    t.until(CTRL_C, "outer> ")?;
    t.send("echo after=$?\n")?;
    t.expect("after=130")?;
    // One that reads what is typed for another job waits for its turn.
    t.send(&format!("{} 'read x; echo got=$x' &\n", inner.join(" ")))?;
    t.expect("outer> ")?;
    t.pause(500);
    t.send("echo not for you\n")?;
    t.expect("\nnot for you")?;
    t.expect("outer> ")?;
    t.send("fg\n")?;
    t.pause(300);
    t.send("hello\n")?;
    t.expect("\ngot=hello")?;
    t.expect("outer> ")?;
    t.send("exit 0\n")?;
    t.ends_with(0)?;
    Ok(PASSED)
}

fn quit_key(context: &Context) -> Checked {
    let mut t = Terminal::start(
        context,
        &guest(context, &["/bin/sh", "-c", "echo on; exec sleep 30"]),
    )?;
    t.expect("on\r\n")?;
    t.pause(300);
    t.send(CTRL_BACKSLASH)?;
    t.ends_with(131)?;
    Ok(PASSED)
}

fn a_terminal_it_is(context: &Context) -> Checked {
    let line = "test -t 0 && test -t 1 && stty size && stty -a | grep -c icanon && tty >/dev/null && echo yes; exit 3";
    let mut t = Terminal::start(context, &guest(context, &["/bin/sh", "-c", line]))?;
    t.expect("30 100\r\n1\r\nyes\r\n")?;
    t.ends_with(3)?;
    Ok(PASSED)
}

/// What a program does to the terminal reaches it, and does not outlive the machine.
fn settings(context: &Context) -> Checked {
    let inner: Vec<String> = guest(context, &["/bin/sh", "-c"])
        .iter()
        .map(|w| format!("'{w}'"))
        .collect();
    let line = "stty -echo; echo silent; read x; echo got $x; stty echo; exit 6";
    let outer = words(&["/usr/bin/env", "PS1=outer> ", "/bin/sh", "-i"]);
    let mut t = Terminal::start(context, &outer)?;
    t.expect("outer> ")?;
    t.send(&format!("stty -g > before; {} '{line}'\n", inner.join(" ")))?;
    t.expect("\nsilent\r\n")?;
    t.send("secret\n")?;
    t.expect("got secret")?;
    t.expect("outer> ")?;
    t.send("echo status=$?; stty -g > after; cmp before after && echo same\n")?;
    t.expect("status=6")?;
    t.expect("\nsame")?;
    if t.all().matches("secret").count() != 1 {
        return Err(format!("`stty -echo` did not hold: {}", t.all()));
    }
    t.send("exit 0\n")?;
    t.ends_with(0)?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::function(
            "terminal/stop_and_continue_inside",
            stop_and_continue_inside,
        )
        .native_too(),
        Case::function(
            "terminal/a_reader_in_the_foreground",
            a_reader_in_the_foreground,
        )
        .native_too(),
        Case::function(
            "terminal/stop_and_continue_outside",
            stop_and_continue_outside,
        )
        .native_too(),
        Case::function("terminal/quit_key", quit_key).native_too(),
        Case::function("terminal/a_terminal_it_is", a_terminal_it_is).native_too(),
        Case::function("terminal/settings", settings).native_too(),
    ]
    .into_iter()
    .map(Case::any_paging)
    .collect()
}
