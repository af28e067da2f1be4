//! Runs the moewe binary with a clean environment and holds what it printed. A run that takes
//! longer than a minute fails its test.

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

const TIMEOUT: Duration = Duration::from_secs(60);

/// The binary with the environment of a user who set nothing.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moewe"));
    command.args(args).env("XDG_RUNTIME_DIR", std::env::temp_dir());
    let names = ["MOEWE_MODEL", "MOEWE_HOME", "MOEWE_DEVICE", "HF_HOME", "HF_HUB_CACHE"];
    names.iter().for_each(|name| {
        command.env_remove(name);
    });
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn run(args: &[&str]) -> Ran {
    finish(command(args), "")
}

/// Runs to the end with `input` on stdin, if there is any.
pub(crate) fn finish(mut command: Command, input: &str) -> Ran {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().expect("the program starts");
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).expect("the program reads its input");
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let output = receiver
        .recv_timeout(TIMEOUT)
        .unwrap_or_else(|_| panic!("{command:?} ran longer than {TIMEOUT:?}"))
        .expect("its output is read");
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

impl Ran {
    /// Asserts success and gives stdout.
    #[track_caller]
    pub(crate) fn stdout(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// Asserts exit code 1, one sentence that contains all `parts`, and no panic.
    #[track_caller]
    pub(crate) fn fails_with(&self, parts: &[&str]) {
        self.fails_as(1, parts);
    }

    /// The same for another exit code.
    #[track_caller]
    pub(crate) fn fails_as(&self, code: i32, parts: &[&str]) {
        let errors: Vec<&str> =
            self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(errors.len(), 1, "{self:?}");
        for part in parts {
            assert!(errors[0].contains(part), "{part:?} is not in {:?}", errors[0]);
        }
    }
}
