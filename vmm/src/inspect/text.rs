//! A guest's memory as text.

use std::fmt::Write as _;

use super::{Inspection, Mapping, Process, Zone};
use crate::cli::Size;

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Columns; what is longer is cut, or not if it is `None`.
    pub width: Option<usize>,
    /// With colours.
    pub colour: bool,
    /// With every mapping of every process.
    pub maps: bool,
}

/// Columns of a zone's bar.
const BAR: usize = 48;
/// Sharing is told up to this many entries one by one.
const SHARES_SHOWN: usize = 6;

/// The text, its lines ended.
#[must_use]
pub fn render(what: &Inspection, style: Style) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = head(&mut out, what);
    for zone in &what.zones {
        let _ = zone_lines(&mut out, what, zone, style);
    }
    let _ = layers(&mut out, what);
    let _ = sharing(&mut out, what);
    let _ = faults(&mut out, what);
    let _ = processes(&mut out, what, style);
    if what.truncated {
        out.push_str("\nSome processes, mappings or frames were left out: they are too many.\n");
    }
    match style.width {
        Some(width) => out.lines().map(|line| cut(line, width) + "\n").collect(),
        None => out,
    }
}

fn head(out: &mut String, what: &Inspection) -> std::fmt::Result {
    let guest = &what.guest;
    let time = duration(what.uptime_ms);
    let state = match what.status {
        None => format!("running for {time}"),
        Some(status) => format!("ended with status {status} after {time}"),
    };
    let command: Vec<_> = guest.command.iter().map(|word| printable(word)).collect();
    writeln!(out, "guest      {} (pid {}), {state}", guest.id, guest.pid)?;
    writeln!(out, "command    {}", command.join(" "))
}

fn zone_lines(out: &mut String, what: &Inspection, zone: &Zone, style: Style) -> std::fmt::Result {
    let size = |frames: u64| Size(frames * what.frame_bytes).to_string();
    writeln!(out)?;
    writeln!(
        out,
        "{:<10} {} frames, {}  {}",
        zone.name,
        zone.frames,
        size(zone.frames),
        bar(what, zone, style)
    )?;
    let order = what.legend.states.iter();
    for (at, state) in order.enumerate() {
        let Some(&frames) = zone.states.get(state) else {
            continue;
        };
        let share = percent(frames, zone.frames);
        writeln!(
            out,
            "  {} {state:<10} {frames:>9}  {:>8}  {share:>5}",
            mark(at, style),
            size(frames)
        )?;
    }
    Ok(())
}

/// The states' letters and colours in the legend's order.
const MARKS: [(char, u8); 9] = [
    ('.', 90),
    ('-', 37),
    ('#', 32),
    ('!', 31),
    ('s', 34),
    ('m', 33),
    ('w', 35),
    ('b', 31),
    ('?', 37),
];

fn mark(state: usize, style: Style) -> String {
    let (letter, colour) = MARKS[state.min(MARKS.len() - 1)];
    if style.colour {
        format!("\x1b[{colour}m{letter}\x1b[0m")
    } else {
        letter.to_string()
    }
}

/// The zone from its first to its last frame, each column as the state most of its frames used are in.
fn bar(what: &Inspection, zone: &Zone, style: Style) -> String {
    if zone.runs.is_empty() || zone.frames == 0 {
        return String::new();
    }
    let mut columns = vec![vec![0_u64; what.legend.states.len()]; BAR];
    let mut at = 0;
    for run in &zone.runs {
        let end = at + u64::from(run.0);
        while at < end {
            let column = (at * BAR as u64 / zone.frames) as usize;
            let next = ((column as u64 + 1) * zone.frames).div_ceil(BAR as u64);
            let part = next.min(end) - at;
            if let Some(count) = columns
                .get_mut(column)
                .and_then(|column| column.get_mut(usize::from(run.1)))
            {
                *count += part;
            }
            at += part;
        }
    }
    let busiest = |counts: &Vec<u64>| {
        // What is in use shows, however little it is.
        let used = counts.iter().enumerate().skip(1).max_by_key(|(_, n)| **n);
        used.filter(|(_, n)| **n > 0).map_or(0, |(state, _)| state)
    };
    let marks: String = columns.iter().map(|c| mark(busiest(c), style)).collect();
    format!("[{marks}]")
}

fn layers(out: &mut String, what: &Inspection) -> std::fmt::Result {
    let frozen: u64 = what.processes.iter().map(|process| process.frozen).sum();
    let size = |frames: u64| Size(frames * what.frame_bytes).to_string();
    for layer in &what.layers {
        writeln!(
            out,
            "\ntemplate   {} frames from {} on, {}, read-only and not the guest's",
            layer.frames,
            layer.first,
            size(layer.frames)
        )?;
    }
    if !what.layers.is_empty() && what.processes.iter().any(|p| !p.maps.is_empty()) {
        writeln!(
            out,
            "           mapped by {frozen} entries of its processes"
        )?;
    }
    Ok(())
}

fn sharing(out: &mut String, what: &Inspection) -> std::fmt::Result {
    let shared = what.sharing.iter().filter(|(n, _)| *n > 1);
    let frames: u64 = shared.clone().map(|(_, frames)| frames).sum();
    let saved = what.frames_saved();
    writeln!(
        out,
        "\nsharing    {frames} frames are mapped more than once, which saves {saved} frames, {}",
        Size(saved * what.frame_bytes)
    )?;
    let mut parts: Vec<_> = shared.collect();
    let rest: u64 = parts.iter().skip(SHARES_SHOWN).map(|(_, f)| f).sum();
    parts.truncate(SHARES_SHOWN);
    let mut words: Vec<_> = parts.iter().map(|(n, f)| format!("{f} by {n}")).collect();
    if rest > 0 {
        words.push(format!("{rest} by more"));
    }
    if !words.is_empty() {
        writeln!(out, "           {}", words.join(", "))?;
    }
    Ok(())
}

/// The counters that have a number each, one group a line.
fn faults(out: &mut String, what: &Inspection) -> std::fmt::Result {
    let groups = [("/exits", "exits"), ("/memory/faults", "faults")];
    for (path, name) in groups {
        let Some(group) = what.counters.pointer(path).and_then(|g| g.as_object()) else {
            continue;
        };
        let words: Vec<_> = group
            .iter()
            .filter_map(|(name, value)| Some((name, value.as_u64().filter(|n| *n > 0)?)))
            .map(|(name, value)| format!("{value} {}", name.replace('_', " ")))
            .collect();
        writeln!(out, "{name:<10} {}", words.join(", "))?;
    }
    Ok(())
}

fn processes(out: &mut String, what: &Inspection, style: Style) -> std::fmt::Result {
    if what.processes.is_empty() {
        return writeln!(out, "\nno process has memory");
    }
    writeln!(
        out,
        "\n{:>7} {:>7} {:<8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>7}  {:<20} NAME",
        "PID",
        "PPID",
        "STATE",
        "VIRTUAL",
        "RESIDENT",
        "PEAK",
        "PRIVATE",
        "FROZEN",
        "TABLES",
        "AGES"
    )?;
    for p in &what.processes {
        process(out, what, p)?;
        if style.maps {
            for map in &p.maps {
                mapping(out, what, map)?;
            }
        }
    }
    Ok(())
}

fn process(out: &mut String, what: &Inspection, p: &Process) -> std::fmt::Result {
    let size = |pages: u64| Size(pages * what.frame_bytes).to_string();
    let oldest = p.ages.iter().rposition(|n| *n > 0).map_or(1, |at| at + 1);
    let ages: Vec<_> = p.ages.iter().take(oldest).map(u64::to_string).collect();
    writeln!(
        out,
        "{:>7} {:>7} {:<8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>7}  {:<20} {}",
        p.pid,
        p.ppid,
        p.state,
        size(p.virtual_pages),
        size(p.resident),
        size(p.peak_resident),
        size(p.private),
        size(p.frozen),
        p.tables,
        ages.join("/"),
        printable(&p.name)
    )
}

fn mapping(out: &mut String, what: &Inspection, map: &Mapping) -> std::fmt::Result {
    let size = |pages: u64| Size(pages * what.frame_bytes).to_string();
    writeln!(
        out,
        "          {:012x}-{:012x} {} {:>8} {:>8} resident {:>8} frozen {:>8} shared {:>8} dirty  {}",
        map.start,
        map.end,
        map.rights,
        Size(map.end - map.start).to_string(),
        size(map.resident),
        size(map.frozen),
        size(map.shared),
        size(map.dirty),
        printable(&map.name)
    )
}

/// Names come from the guest: nothing in them may move a terminal's cursor.
fn printable(text: &str) -> String {
    let safe = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(safe).collect()
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return String::new();
    }
    format!("{:.1}%", part as f64 * 100.0 / whole as f64)
}

fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{}.{} s", seconds, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A line cut to `width` columns; colours take none.
fn cut(line: &str, width: usize) -> String {
    let (mut kept, mut columns, mut escape) = (String::new(), 0, false);
    for c in line.chars() {
        escape |= c == '\x1b';
        if !escape {
            columns += 1;
        }
        if columns <= width || escape {
            kept.push(c);
        }
        escape &= c != 'm';
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::tests::example;

    const PLAIN: Style = Style {
        width: None,
        colour: false,
        maps: true,
    };

    #[test]
    fn text_tells_lists_sharing_and_processes() {
        let text = render(&example(), PLAIN);
        for part in [
            "guest      warm (pid 7), running for 1 min 5 s",
            "# active             4    16 KiB",
            "2 frames are mapped more than once, which saves 3 frames, 12 KiB",
            "1 by 2, 1 by 3",
            "template   300 frames from 2048 on",
            "24 KiB frozen",
            "[heap]",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn names_cannot_control_a_terminal() {
        let mut what = example();
        what.processes[0].name = "\x1b[2Jx".to_owned();
        assert!(render(&what, PLAIN).contains("?[2Jx"));
    }

    #[test]
    fn cut_counts_columns_not_colours() {
        assert_eq!(cut("\x1b[32mabc\x1b[0mdef", 4), "\x1b[32mabc\x1b[0md");
    }

    #[test]
    fn bar_shows_what_is_used_however_little() {
        let what = example();
        let bar = bar(&what, &what.zones[0], PLAIN);
        assert_eq!(bar.len(), BAR + 2);
        assert!(bar.starts_with("[#") && bar.ends_with(".]"), "{bar}");
    }
}
