//! A machine without KVM: a refusal that says so and points to `vmm doctor`, which says more.

use tests::case::{Case, Checked, Expect, Launch, On, PASSED};
use tests::context::Context;
use tests::process::{Limits, run};

fn doctor(context: &Context) -> Checked {
    let vmm = context.setup.vmm.to_string_lossy().into_owned();
    let limits = Limits {
        timeout: context.timeout,
        signal: None,
    };
    for args in [&["doctor"][..], &["doctor", "--json"][..]] {
        let mut words = vec![vmm.clone()];
        words.extend(args.iter().map(|&a| a.to_owned()));
        let output = run(&mut context.command(&words), b"", &limits).map_err(|e| e.to_string())?;
        let text = output.out() + &output.err();
        if output.status == 0 || !text.contains("/dev/kvm") {
            return Err(format!("{args:?}: status {}: {text}", output.status));
        }
        if args.len() == 2 && serde_json::from_slice::<serde_json::Value>(&output.stdout).is_err() {
            return Err(format!("not JSON: {text}"));
        }
    }
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    let launch = Launch::new("/bin/true", &[]);
    let refused = Expect::Refused(vec![125], "vmm doctor".to_owned());
    vec![
        Case::new("no_kvm/run_points_to_doctor", launch, refused)
            .on(On::NoKvm)
            .not_native("the VMM's own message"),
        Case::function("no_kvm/doctor", doctor).on(On::NoKvm),
    ]
}
