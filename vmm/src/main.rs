//! The `vmm` command; see `vmm --help`.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
