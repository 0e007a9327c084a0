//! `vmm pool`: a template that is kept, with machines that wait for its clones.
//!
//! `vmm fork` without a pool starts processes, and they make machines, before a clone can run. A pool has both: whoever wants a
//! clone connects to a socket in the pool's run directory and says what `vmm fork` says to its workers ([`super::wire`]); the
//! clone takes a machine that waits. When more clones run than machines waited, machines are made, at most
//! [`MOST_IN_A_PROCESS`] in all; `vmm fork` runs the others in workers of its own. The guest that was frozen may end
//! meanwhile.
//!
//! Clones end with the `vmm fork` that wanted them, or with the pool. Who may connect is who may use the run directory: its owner.

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::apart::MOST_IN_A_PROCESS;
use super::stock::{Stock, StockError};
use super::talk::{Numbers, Talk, TalkError};
use super::wire::{Line, News, Order};
use crate::cli::snapshot::{VerbError, template};
use crate::cli::{STATUS_FAILURE, complain, say};
use crate::control::protocol::{Frozen, Hello, PROTOCOL, Reply, Request, Response};
use crate::control::rundir::{self, Called, RunDir, RunDirError};
use crate::control::server::{Answer, Server};
use crate::locks::{Mutex, rank};
use crate::machine::RunError;
use crate::machine::verbs::chain;

/// How long clones may take to end with the pool.
const PATIENCE: Duration = Duration::from_secs(2);

/// Keep a template of a running guest, with machines that wait for copies of it
///
/// The guest is frozen, unless it has frozen itself (/dev/vmm) or `vmm freeze` has done it, and goes on; it may end. `vmm fork POOL` then starts copies in
/// machines that are there; a copy that ends leaves its machine to the next one. About 100 copies run in a pool at once; what is more, `vmm fork` runs in processes of its own. The command ends when `vmm kill POOL` or a signal ends it, and all
/// copies in its machines with it.
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Exit status: 0 if vmm kill has ended it, 128+N if signal N has; 125 if vmm itself failed."
)]
pub(in crate::cli) struct PoolArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,

    /// What the pool is called [default: GUEST-pool]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Machines that wait, 1 to 100
    #[arg(short = 'm', long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_IN_A_PROCESS)))]
    machines: u8,

    /// Processors of each machine [default: as many as the guest has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,

    /// Freeze the guest again, even if it is frozen
    #[arg(long)]
    anew: bool,
}

#[derive(Debug, thiserror::Error)]
enum PoolError {
    #[error(transparent)]
    Name(#[from] RunDirError),
    #[error(transparent)]
    Verb(#[from] VerbError),
    #[error(transparent)]
    Stock(#[from] StockError),
    #[error(transparent)]
    Machine(#[from] RunError),
    #[error("the pool's socket")]
    Socket(#[source] io::Error),
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
}

/// What ends a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Killed,
    Signal(i32),
    /// Its socket does not work any more, which was said.
    Deaf,
}

pub(in crate::cli) fn main(args: &PoolArgs) -> ExitCode {
    let status = run(args).unwrap_or_else(|error| {
        complain(&error);
        STATUS_FAILURE
    });
    // Without taking down machines: nobody waits for them.
    std::process::exit(status.into())
}

fn run(args: &PoolArgs) -> Result<u8, PoolError> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => format!("{}-pool", args.guest),
    };
    let dir = RunDir::create(&rundir::folder(), Called::Name(&name))?;
    let clones = dir.clones();
    let (ends, ended) = mpsc::channel();
    let pool = Arc::new(Pool::new(&name, ends.clone()));
    let control = Server::start(dir, answers(&pool)).map_err(PoolError::Socket)?;
    wait_for_signals(ends.clone()).map_err(PoolError::Signals)?;
    let (frozen, file) = template(&args.guest, args.anew)?;
    let copy = file.try_clone().map_err(PoolError::Socket)?;
    let stock = Arc::new(Stock::open(copy, args.cpus, args.machines.into())?);
    stock.fill()?;
    let listener = UnixListener::bind(clones).map_err(PoolError::Socket)?;
    pool.opens((Arc::new(file), frozen), &stock);
    let serves = (Arc::clone(&pool), stock);
    let thread = std::thread::Builder::new().name("pool".into());
    let thread = thread.spawn(move || serve(&listener, &serves, &ends));
    thread.map_err(PoolError::Socket)?;
    let wait = match args.machines {
        1 => "1 machine waits".to_owned(),
        some => format!("{some} machines wait"),
    };
    say(&format!("vmm: {name}: {wait}\n"));
    let why = ended.recv().unwrap_or(Why::Deaf);
    drop(control);
    pool.end();
    Ok(match why {
        Why::Killed => 0,
        Why::Signal(number) => 128 + number as u8,
        Why::Deaf => STATUS_FAILURE,
    })
}

/// Says which signal ends the pool.
fn wait_for_signals(ends: Sender<Why>) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(move || {
        for number in signals.forever() {
            // The first has been heard.
            let _ = ends.send(Why::Signal(number));
        }
    })?;
    Ok(())
}

/// Takes in those who want clones.
fn serve(listener: &UnixListener, (pool, stock): &(Arc<Pool>, Arc<Stock>), ends: &Sender<Why>) {
    let numbers = Arc::new(Numbers::Own(AtomicU32::new(1)));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                complain(&PoolError::Socket(error));
                let _ = ends.send(Why::Deaf);
                return;
            }
        };
        let (pool, stock, numbers) = (Arc::clone(pool), Arc::clone(stock), Arc::clone(&numbers));
        let thread = std::thread::Builder::new().name("talk".into());
        let talks = thread.spawn(move || {
            if let Err(error) = converse(stream, &pool, &stock, &numbers) {
                tracing::debug!(%error, "somebody on the pool's socket is gone");
            }
        });
        if let Err(error) = talks {
            tracing::warn!(%error, "somebody on the pool's socket is sent away");
        }
    }
}

fn converse(
    stream: UnixStream,
    pool: &Pool,
    stock: &Arc<Stock>,
    numbers: &Arc<Numbers>,
) -> Result<(), TalkError> {
    let line = Line::over(stream);
    let lot = match line.hear().map_err(TalkError::Line) {
        Ok(Some((Order::Serve(lot), _))) if lot.has_good_name() => Ok(lot),
        Ok(Some((Order::Serve(_), _))) => Err(TalkError::Template),
        Ok(Some((Order::Start(_), _))) => Err(TalkError::Order),
        Ok(None) => return Ok(()),
        Err(error) => Err(error),
    };
    let mut lot = lot.inspect_err(|error| _ = line.say(&News::Error(chain(error)), &[]))?;
    lot.template.get_or_insert_with(|| pool.name.clone());
    let room = u32::from(MOST_IN_A_PROCESS).saturating_sub(pool.copies());
    let talk = Talk::new(line, lot, stock, (numbers, room as usize))?;
    talk.tell(&News::Room(room));
    pool.joins(&talk);
    talk.listen()
}

/// What a pool says of itself.
struct Pool {
    name: String,
    since: Instant,
    ends: Mutex<rank::PoolTalks, Sender<Why>>,
    open: Mutex<rank::PoolTalks, Option<Open>>,
}

/// What is there once the template is.
struct Open {
    template: (Arc<File>, Frozen),
    stock: Arc<Stock>,
    talks: Vec<Weak<Talk>>,
}

impl Pool {
    fn new(name: &str, ends: Sender<Why>) -> Self {
        Self {
            name: name.to_owned(),
            since: Instant::now(),
            ends: Mutex::new(ends),
            open: Mutex::new(None),
        }
    }

    fn opens(&self, template: (Arc<File>, Frozen), stock: &Arc<Stock>) {
        *self.open.lock() = Some(Open {
            template,
            stock: Arc::clone(stock),
            talks: Vec::new(),
        });
    }

    fn joins(&self, talk: &Arc<Talk>) {
        if let Some(open) = &mut *self.open.lock() {
            open.talks.retain(|talk| talk.strong_count() > 0);
            open.talks.push(Arc::downgrade(talk));
        }
    }

    fn talks(&self) -> Vec<Arc<Talk>> {
        let open = self.open.lock();
        let talks = open.iter().flat_map(|open| &open.talks);
        talks.filter_map(Weak::upgrade).collect()
    }

    /// Copies that run.
    fn copies(&self) -> u32 {
        self.talks().iter().map(|talk| talk.clones() as u32).sum()
    }

    /// Ends all clones, and gives them a moment to give back what they have of the host.
    fn end(&self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let talks = self.talks();
            if talks.is_empty() || Instant::now() >= until {
                return;
            }
            talks.iter().for_each(|talk| talk.end());
            drop(talks);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn hello(&self) -> Hello {
        let open = self.open.lock();
        let stock = open.as_ref().map(|open| Arc::clone(&open.stock));
        drop(open);
        let data = stock.as_ref().map(|stock| stock.data().clone());
        Hello {
            protocol: PROTOCOL,
            guest: data.unwrap_or_default().about(self.name.clone()),
            uptime_ms: self.since.elapsed().as_millis() as u64,
            ready: Some(stock.is_some()),
            pool: Some(crate::control::protocol::Pool {
                machines: stock.map_or(0, |stock| stock.waiting() as u32),
                copies: self.copies(),
            }),
            clones: None,
        }
    }

    fn answer(&self, request: &Request) -> Reply {
        match request {
            Request::Hello => Response::Hello {
                ok: true,
                hello: self.hello(),
            }
            .into(),
            Request::Kill {
                signal: libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGHUP,
            } => {
                // Somebody else may have ended it.
                let _ = self.ends.lock().send(Why::Killed);
                Response::Done { ok: true }.into()
            }
            Request::Kill { .. } => Response::failed("a pool can be ended only").into(),
            Request::Template => match &*self.open.lock() {
                Some(open) => Reply::with_file(
                    Response::Frozen {
                        ok: true,
                        frozen: open.template.1,
                    },
                    Arc::clone(&open.template.0),
                ),
                None => Response::failed("the template is not there yet").into(),
            },
            Request::Inspect { .. }
            | Request::Snapshot { .. }
            | Request::Freeze
            | Request::Reset
            | Request::Clones { .. } => Response::failed(
                "this is a pool, not a guest: vmm fork starts copies, and vmm ps lists them",
            )
            .into(),
            Request::Clone { .. } => Response::gone().into(),
        }
    }
}

fn answers(pool: &Arc<Pool>) -> Answer {
    let pool = Arc::clone(pool);
    Arc::new(move |request, _| pool.answer(request))
}
