//! A console (virtio 1.2, 5.3) with one port: Linux's `hvc0`. A screen's size is in its configuration
//! space, and the driver hears when it changes.
//!
//! What the guest writes goes to a writer, which may wait for room; the device's thread waits then,
//! with its registers locked, and nobody else. What is typed waits in the [`Port`], a bounded amount,
//! for buffers of the driver's.
//!
//! Linux throws away what comes while its driver starts, after it has given buffers already. So what is
//! typed waits until the driver has been quiet for a moment.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Bell, Request, VirtioDevice};
use crate::devices::keyboard::{Keyboard, ScreenSize};

const KIND: u32 = 3;
/// Feature: the configuration space has the screen's size.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// The queue of what is typed.
const RECEIVE: usize = 0;
/// The queue of what the guest writes.
const TRANSMIT: usize = 1;
/// Bytes kept that the guest has not taken yet.
const WAITING: usize = 4096;
/// Bytes copied at a time.
const CHUNK: usize = 4096;
/// Most bytes of one request that are written; Linux sends a page at most.
const MOST: usize = 1 << 20;
/// How long a driver has been quiet before it is believed that it has started.
const QUIET: Duration = Duration::from_millis(250);
/// How long a start can take, however much is printed meanwhile.
const LONGEST_START: Duration = Duration::from_secs(2);

/// What a console remembers besides its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSaved {
    /// Typed, and not taken yet.
    pub waiting: Vec<u8>,
    /// The screen, if there is one.
    pub size: Option<ScreenSize>,
}

/// What was saved is not of such a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved console holds more than a console can, or its screen comes from nowhere")]
pub struct RestoreError;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<u8>,
    size: Option<ScreenSize>,
    starting: Option<Starting>,
    /// The driver takes what it is given.
    listening: bool,
}

/// A driver that is ready as far as its registers tell.
#[derive(Clone, Copy, Debug)]
struct Starting {
    since: Instant,
    /// It has printed something then, or has become ready.
    last_sign: Instant,
}

impl State {
    /// Whether the driver takes what is typed.
    fn listens(&mut self) -> bool {
        if let Some(starting) = self.starting
            && (starting.last_sign.elapsed() >= QUIET || starting.since.elapsed() >= LONGEST_START)
        {
            self.starting = None;
            self.listening = true;
        }
        self.listening
    }
}

/// The side of the console that somebody types into. Its lock is never held for long.
#[derive(Debug)]
pub struct Port {
    state: Mutex<State>,
    /// Whether there is a screen at all, which the driver learns once.
    screen: bool,
    bell: OnceLock<Bell>,
}

impl Port {
    /// A port; `size` is its screen's, if it has one.
    #[must_use]
    pub fn new(size: Option<ScreenSize>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                size,
                ..State::default()
            }),
            screen: size.is_some(),
            bell: OnceLock::new(),
        })
    }

    /// What must be known to go on elsewhere.
    #[must_use]
    pub fn save(&self) -> PortSaved {
        let state = self.state.lock();
        PortSaved {
            waiting: state.waiting.iter().copied().collect(),
            size: state.size,
        }
    }

    /// Makes it what it was; before the device's registers are restored.
    ///
    /// # Errors
    /// It could not have been saved, or only one of the two has a screen.
    pub fn restore(&self, saved: &PortSaved) -> Result<(), RestoreError> {
        if saved.waiting.len() > WAITING || saved.size.is_some() != self.screen {
            return Err(RestoreError);
        }
        let mut state = self.state.lock();
        state.waiting = saved.waiting.iter().copied().collect();
        state.size = saved.size;
        Ok(())
    }
}

impl Keyboard for Port {
    fn room(&self) -> usize {
        WAITING - self.state.lock().waiting.len()
    }

    fn input(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let count = bytes.len().min(WAITING - state.waiting.len());
        state.waiting.extend(&bytes[..count]);
        count
    }

    fn feed(&self) -> bool {
        let mut state = self.state.lock();
        if state.waiting.is_empty() {
            return true;
        }
        if state.listens()
            && let Some(bell) = self.bell.get()
        {
            bell.look(RECEIVE);
        }
        false
    }

    fn resize(&self, size: ScreenSize) {
        {
            let mut state = self.state.lock();
            if !self.screen || state.size == Some(size) {
                return;
            }
            state.size = Some(size);
        }
        if let Some(bell) = self.bell.get() {
            bell.configuration_changed();
        }
    }
}

/// The device.
pub struct Console {
    port: Arc<Port>,
    output: Box<dyn Write + Send>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// A console that writes to `output` and reads what is typed into `port`.
    #[must_use]
    pub fn new(port: &Arc<Port>, output: Box<dyn Write + Send>) -> Self {
        Self {
            port: Arc::clone(port),
            output,
        }
    }

    fn type_in(&self, mut request: Request<'_>) -> u32 {
        let mut state = self.port.state.lock();
        let room = request.to.available_bytes();
        let count = room.min(state.waiting.len());
        let bytes: Vec<u8> = state.waiting.drain(..count).collect();
        match request.to.write_all(&bytes) {
            Ok(()) => u32::try_from(count).expect("a few pages"),
            Err(_) => 0,
        }
    }

    fn print(&mut self, mut request: Request<'_>) {
        if let Some(starting) = &mut self.port.state.lock().starting {
            starting.last_sign = Instant::now();
        }
        let mut buffer = [0; CHUNK];
        for _ in 0..MOST / CHUNK {
            let Ok(count @ 1..) = request.from.read(&mut buffer) else {
                return;
            };
            if let Err(error) = self.output.write_all(&buffer[..count]) {
                tracing::debug!(%error, "the console");
                return;
            }
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        u64::from(self.port.screen) << VIRTIO_CONSOLE_F_SIZE
    }

    fn queues(&self) -> usize {
        2
    }

    /// `struct virtio_console_config`.
    fn config(&self) -> Cow<'_, [u8]> {
        let size = self.port.state.lock().size.unwrap_or_default();
        let mut config = vec![0; 12];
        config[..2].copy_from_slice(&size.columns.to_le_bytes());
        config[2..4].copy_from_slice(&size.rows.to_le_bytes());
        Cow::Owned(config)
    }

    fn connect(&mut self, bell: Bell) {
        // Once: a port belongs to one device.
        let _ = self.port.bell.set(bell);
    }

    /// Linux looks at the size only when it is told that it has changed.
    fn start(&mut self, features: u64) {
        let now = Instant::now();
        {
            let mut state = self.port.state.lock();
            state.listening = false;
            state.starting = Some(Starting {
                since: now,
                last_sign: now,
            });
        }
        if features & 1 << VIRTIO_CONSOLE_F_SIZE != 0
            && let Some(bell) = self.port.bell.get()
        {
            bell.configuration_changed();
        }
    }

    fn ready(&self, queue: usize) -> bool {
        let mut state = self.port.state.lock();
        queue != RECEIVE || !state.waiting.is_empty() && state.listens()
    }

    fn answer(&mut self, queue: usize, request: Request<'_>) -> u32 {
        match queue {
            RECEIVE => self.type_in(request),
            TRANSMIT => {
                self.print(request);
                0
            }
            _ => 0,
        }
    }
}
