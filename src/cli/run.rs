//! `moewe run` and `moewe chat`.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, bail};
use clap::Args;
use moewe::{
    engine::FinishReason,
    llm::{Generation, Llm},
    text::Message,
};
use rustyline::error::ReadlineError;

use super::{
    options::{ModelArgs, SamplingArgs},
    report::{Speed, Stopwatch, print_cache, print_line, print_profile},
};

/// Options of `moewe chat`.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
}

/// Options of `moewe run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// What to answer or continue; `-` reads standard input
    prompt: Option<String>,
    #[command(flatten)]
    chat: Chat,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object with the text and its speed
    #[arg(long)]
    json: bool,
    /// Print a table of kernels (slower: every kernel is timed)
    #[arg(long)]
    profile: bool,
}

impl Run {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let prompt = match self.prompt.as_deref() {
            None if std::io::stdin().is_terminal() && !self.json => return self.chat.run(),
            None | Some("-") => {
                std::io::read_to_string(std::io::stdin()).context("standard input is not text")?
            }
            Some(text) => text.to_owned(),
        };
        let mut llm = self.chat.model.load(self.chat.model.options(None)?)?;
        let tokens = if self.raw {
            llm.raw_prompt(&prompt)?
        } else {
            let mut messages = self.chat.opening();
            messages.push(Message::new("user", prompt));
            llm.chat_prompt(&messages)?
        };
        if self.profile {
            llm.engine.runner().start_profile();
        }
        let (answer, speed) = self.chat.answer(&mut llm, &tokens, !self.json)?;
        if self.json {
            let finish =
                answer.finish.map(|f| if f == FinishReason::Stop { "stop" } else { "length" });
            let row = serde_json::json!({
                "text": answer.text,
                "tokens": answer.tokens,
                "finish_reason": finish,
                "speed": speed,
            });
            print_line(row)?;
        }
        eprintln!("{speed}");
        if self.profile {
            let timings = pollster::block_on(llm.engine.runner().take_profile())?;
            if let Some(rec) = llm.engine.runner().last_recording() {
                let n = rec.dispatches.len();
                eprintln!("a step of the last shape has {n} dispatches");
            }
            print_profile(&timings, answer.tokens.len());
            if let Some(cache) = &llm.engine.stats().expert_cache {
                print_cache(cache);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Chat {
    fn opening(&self) -> Vec<Message> {
        self.system.iter().map(|text| Message::new("system", text.as_str())).collect()
    }

    /// Generates an answer, printing it as it comes unless told to be silent.
    fn answer(
        &self,
        llm: &mut Llm,
        prompt: &[u32],
        print: bool,
    ) -> anyhow::Result<(Generation, Speed)> {
        let stopped = interrupted();
        let params = self.sampling.params(&llm.defaults, self.model.seed);
        let mut watch = Stopwatch::start();
        let mut out = std::io::stdout();
        let mut failure = None;
        let answer = llm.generate(prompt, params, self.sampling.stop.clone(), |piece| {
            watch.piece();
            if print {
                failure = write!(out, "{piece}").and_then(|()| out.flush()).err();
            }
            failure.is_none() && !stopped.swap(false, Ordering::Relaxed)
        })?;
        if let Some(error) = failure {
            bail!("the answer cannot be written: {error}");
        }
        if print {
            print_line("")?;
        }
        let speed = watch.stop(prompt.len(), answer.tokens.len());
        Ok((answer, speed))
    }

    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let mut llm = self.model.load(self.model.options(None)?)?;
        eprintln!("Type a message; /reset starts over, /quit ends, Ctrl-C stops an answer.");
        let mut editor = rustyline::DefaultEditor::new()?;
        let mut messages = self.opening();
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => break,
                Err(error) => return Err(error.into()),
            };
            match line.trim() {
                "" => continue,
                "/quit" | "/exit" => break,
                "/reset" => {
                    messages = self.opening();
                    continue;
                }
                command if command.starts_with('/') => {
                    eprintln!("{command} is not a command; there are /reset and /quit");
                    continue;
                }
                _ => {}
            }
            editor.add_history_entry(&line)?;
            messages.push(Message::new("user", line));
            let reply = llm.chat_prompt(&messages).map_err(anyhow::Error::from);
            match reply.and_then(|tokens| self.answer(&mut llm, &tokens, true)) {
                Ok((answer, speed)) => {
                    messages.push(Message::new("assistant", answer.text));
                    eprintln!("({speed})");
                }
                // The conversation may have outgrown the context: say so and go on.
                Err(error) => {
                    messages.pop();
                    eprintln!("error: {error:#}; /reset starts over");
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A flag that Ctrl-C sets, so that an answer stops and the program goes on.
fn interrupted() -> Arc<AtomicBool> {
    static FLAG: std::sync::OnceLock<Arc<AtomicBool>> = std::sync::OnceLock::new();
    FLAG.get_or_init(|| {
        let flag = Arc::new(AtomicBool::new(false));
        let setter = flag.clone();
        // Without a handler Ctrl-C ends the program, which is what it does elsewhere.
        let _ = ctrlc::set_handler(move || {
            if setter.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
        flag
    })
    .clone()
}
