//! An interpreter that is warmed once, and forked for each request: what one request does to it, the next one does not
//! find.
//!
//! ```sh
//! printf '2 ** 100\nprimes.clear()\nlen(primes)\n1/0\n' | cargo run --release -p vmm --example per_request
//! ```
//!
//! Every line of standard input is an expression; its value is a line of standard output.

use std::error::Error;
use std::io::{self, BufRead, Write};
use std::time::Duration;

use vmm::{Guest, Stdio};

/// What takes long; the point at which it is frozen; a request.
const SERVER: &str = "
import math, sys
primes = [n for n in range(2, 20000) if all(n % d for d in range(2, math.isqrt(n) + 1))]
with open('/dev/vmm', 'w') as vmm:
    vmm.write('freeze')
try:
    print(eval(sys.stdin.readline()))
except Exception as error:
    print(f'{type(error).__name__}: {error}')
";

/// Answers every line of `requests`.
pub fn serve(requests: impl BufRead, mut answers: impl Write) -> Result<(), Box<dyn Error>> {
    let warm = Guest::builder("python3")
        .args(["-c", SERVER])
        .root("/")
        .ready_freeze()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let template = warm.freeze()?;
    drop(warm);
    for request in requests.lines() {
        let answer = template
            .fork()
            .stdin(Stdio::bytes(request?.into_bytes()))
            .timeout(Duration::from_secs(60))
            .output()?;
        answers.write_all(&answer.stdout)?;
    }
    Ok(())
}

/// The example.
pub fn main() -> Result<(), Box<dyn Error>> {
    serve(io::stdin().lock(), io::stdout())
}
