//! The rules of the source tree, checked, so that nobody has to remember them.
//!
//! A rule is a pure function over files and stands beside examples that it must and must not
//! catch. This file knows paths and text only; what compiles is the compiler's business.

use std::{fs, path::Path};

/// One file: its path below the repository root, with `/`, and its text.
struct File {
    path: String,
    text: String,
}

/// Files written out in an example: path and text.
type Example = &'static [(&'static str, &'static str)];

struct Rule {
    says: &'static str,
    /// Places that break the rule.
    finds: fn(&[File]) -> Vec<String>,
    bad: &'static [Example],
    good: &'static [Example],
}

/// Each layer and the others it may import. What is not listed (`error`, `config`) is free to all.
const LAYERS: &[(&str, &[&str])] = &[
    ("device", &[]),
    ("kernels", &["device", "weights::WeightFormat", "weights::PAD", "weights::padded"]),
    ("weights", &["device"]),
    ("text", &[]),
    ("vision", &["device", "kernels", "weights"]),
    ("parallel", &["device", "kernels", "weights"]),
    ("model", &["device", "kernels", "weights", "text", "vision", "parallel"]),
    ("engine", &["device", "kernels", "weights", "text", "vision", "parallel", "model"]),
    ("server", &["device", "weights", "text", "vision", "parallel", "model", "engine"]),
];

/// Kernel files without a shader: what several kernels bind or are tested with.
const SHARED_BY_KERNELS: &[&str] = &["mod", "matrix", "testing"];

/// Mapped files and the parts of wgpu that vouch for shaders.
const UNSAFE_FILES: &[&str] =
    &["src/device/gpu.rs", "src/device/pipelines.rs", "src/weights/files.rs"];

/// This file names what it forbids.
const THIS: &str = "tests/tidy.rs";

const LINES_MAX: usize = 500;
const COLUMNS_MAX: usize = 100;

const RULES: &[Rule] = &[
    Rule {
        says: "wgpu is named only under src/device/",
        finds: |files| {
            rust_lines(files, |path, code| {
                let named = words(code, "wgpu").any(|(before, after)| {
                    after.starts_with("::") || before.trim_end().ends_with("use")
                });
                named && !path.starts_with("src/device/")
            })
        },
        bad: &[
            &[("src/kernels/gemv.rs", "fn f(b: &wgpu::Buffer) {}")],
            &[("src/main.rs", "use wgpu as gpu;")],
        ],
        good: &[&[
            ("src/device/gpu.rs", "use wgpu::Buffer;"),
            ("src/lib.rs", "//! Shaders on wgpu::Device.\nuse my_wgpu::Buffer;"),
        ]],
    },
    Rule {
        says: "imports point one way: server, engine, model, kernels, device",
        finds: wrong_imports,
        bad: &[
            &[("src/device/gpu.rs", "use crate::kernels::RmsNorm;")],
            &[("src/kernels/gemv.rs", "fn f() -> crate::weights::Source {}")],
            &[("src/kernels/gemv.rs", "use crate::{weights::{PAD, Source}, device::Tensor};")],
            &[("src/weights/mod.rs", "use super::model;")],
            &[(
                "src/model/attention.rs",
                "use crate::{\n    device::{Tensor, Caps},\n    engine,\n};",
            )],
            &[("src/engine/step.rs", "use crate::server::App;")],
        ],
        good: &[&[
            ("src/device/gpu.rs", "use crate::{Error, device::{Caps, engine}};"),
            ("src/kernels/gemv.rs", "use crate::{device::Tensor, weights::{PAD, padded}};"),
            ("src/engine/step.rs", "use crate::model::Model; // not crate::server"),
            ("src/main.rs", "use moewe::server;"),
        ]],
    },
    Rule {
        says: "the engine does no I/O, reads no clock and spawns nothing",
        finds: engine_effects,
        bad: &[
            &[("src/engine/step.rs", "use std::fs;")],
            &[("src/engine/step.rs", "use std::{collections::VecDeque, time::{Instant}};")],
            &[("src/engine/step.rs", "std::thread::spawn(run);")],
        ],
        good: &[&[
            ("src/engine/step.rs", "use std::{collections::VecDeque, time::Duration};"),
            ("src/server/worker.rs", "use std::thread;"),
        ]],
    },
    Rule {
        says: "a file under src/ or shaders/ has at most 500 lines",
        finds: |files| {
            let long = |f: &&File| f.is_under(&["src", "shaders"]) && f.lines() > LINES_MAX;
            files.iter().filter(long).map(|f| format!("{}: {} lines", f.path, f.lines())).collect()
        },
        bad: &[&[("shaders/gemv.wgsl", TOO_MANY_LINES)]],
        good: &[&[("tests/engine.rs", TOO_MANY_LINES)]],
    },
    Rule {
        says: "a line has at most 100 columns",
        finds: |files| find_lines(files, |_, line| line.chars().count() > COLUMNS_MAX),
        bad: &[&[("src/lib.rs", TOO_WIDE)]],
        good: &[&[("README.md", TOO_WIDE), ("src/lib.rs", "//! Möwe")]],
    },
    Rule {
        says: "nothing is left unfinished, debugged or ignored",
        finds: |files| {
            find_lines(files, |path, line| {
                let line = line.to_lowercase();
                let word = |w| words(&line, w).next().is_some();
                let unfinished = word("todo") || word("fixme") || line.contains("unimplemented!");
                path != THIS && (unfinished || line.contains("dbg!(") || line.contains("[ignore"))
            })
        },
        bad: &[
            &[("shaders/gemv.wgsl", "// FixMe: odd widths")],
            &[("src/lib.rs", "fn f() { todo!() }")],
            &[("src/lib.rs", "let x = dbg!(y);")],
            &[("tests/engine.rs", "[ignore = \"slow\"]")],
            &[("src/lib.rs", "unimplemented!()")],
        ],
        good: &[&[("src/lib.rs", "let mastodon = todos;")]],
    },
    Rule {
        says: "a shader and its kernel share a stem: shaders/S.wgsl and src/kernels/S.rs",
        finds: unpaired_shaders,
        bad: &[&[("shaders/gemv.wgsl", "")], &[("src/kernels/gemv.rs", "")]],
        good: &[&[
            ("shaders/gemv.wgsl", ""),
            ("src/kernels/gemv.rs", ""),
            ("src/kernels/mod.rs", ""),
            ("shaders/format/w8.wgsl", ""),
        ]],
    },
    Rule {
        says: "a file is named after what it holds",
        finds: |files| {
            let vague = ["util", "utils", "common", "helper", "helpers", "manager", "misc"];
            let stem = |part: &str| part.split('.').next().unwrap_or(part).to_string();
            let is_vague = |f: &&File| f.path.split('/').any(|p| vague.contains(&&*stem(p)));
            files.iter().filter(is_vague).map(|f| f.path.clone()).collect()
        },
        bad: &[&[("src/model/utils.rs", "")], &[("shaders/common/sum.wgsl", "")]],
        good: &[&[("src/model/linear.rs", "")]],
    },
    Rule {
        says: "a Rust file opens with `//!`: what it owns, what it must not know",
        finds: |files| {
            let silent = |f: &&File| {
                f.is_under(&["src", "tests", "benches"])
                    && f.is_rust()
                    && !f.text.starts_with("//!")
            };
            files.iter().filter(silent).map(|f| f.path.clone()).collect()
        },
        bad: &[&[("src/lib.rs", "pub mod device;")]],
        good: &[&[("src/lib.rs", "//! All.\npub mod device;"), ("x", "#!/bin/sh")]],
    },
    Rule {
        says: "unsafe stays in the files listed in tests/tidy.rs",
        finds: |files| {
            rust_lines(files, |path, code| {
                words(code, "unsafe").next().is_some() && !UNSAFE_FILES.contains(&path)
            })
        },
        bad: &[&[("src/text/mod.rs", "let s = unsafe { f() };")]],
        good: &[&[
            ("src/device/gpu.rs", "unsafe { f() }"),
            ("src/lib.rs", "#![deny(unsafe_op_in_unsafe_fn)] // unsafe"),
        ]],
    },
    Rule {
        says: "a module is declared by its parent",
        finds: orphans,
        bad: &[
            &[("src/text/stream.rs", ""), ("src/text/mod.rs", "// mod stream;")],
            &[("tests/engine.rs", ""), ("tests/main.rs", "mod engines;")],
            &[("src/text/mod.rs", ""), ("src/lib.rs", "")],
        ],
        good: &[&[
            ("src/lib.rs", "pub mod text;"),
            ("src/main.rs", "mod cli;"),
            ("src/cli.rs", "mod run;"),
            ("src/cli/run.rs", ""),
            ("src/text/mod.rs", "pub(crate) mod stream;"),
            ("src/text/stream.rs", ""),
        ]],
    },
    Rule {
        says: "README.md names only verbs that x knows",
        finds: unknown_verbs,
        bad: &[&[("README.md", "`./x fly`"), ("x", "case $verb in\nrun | test) go ;;\nesac")]],
        good: &[&[
            ("README.md", "`./x` is small: ./x run \"Hi\", ./x test"),
            ("x", "case $verb in\nrun | serve) go ;;\ntest)\n    go\n    ;;\n*) usage ;;\nesac"),
        ]],
    },
];

const TOO_MANY_LINES: &str = ascii(&[b'\n'; LINES_MAX + 1]);
const TOO_WIDE: &str = ascii(&[b'/'; COLUMNS_MAX + 1]);

const fn ascii(bytes: &'static [u8]) -> &'static str {
    match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => panic!("not ASCII"),
    }
}

#[test]
fn the_tree_keeps_its_rules() {
    let files = read_tree();
    for path in ["src/lib.rs", "tests/main.rs", "README.md", "x"] {
        assert!(files.iter().any(|f| f.path == path), "{path} was not read");
    }
    let broken: Vec<String> = RULES
        .iter()
        .flat_map(|rule| (rule.finds)(&files).into_iter().map(move |at| (rule.says, at)))
        .map(|(says, at)| format!("{at}\n    {says}"))
        .collect();
    assert!(broken.is_empty(), "{} places break a rule:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn each_rule_catches_its_bad_examples_alone() {
    let files = |example: Example| -> Vec<File> {
        example.iter().map(|(p, t)| File { path: p.to_string(), text: t.to_string() }).collect()
    };
    for rule in RULES {
        for example in rule.bad {
            assert!(!(rule.finds)(&files(example)).is_empty(), "{}: {example:?}", rule.says);
        }
        for example in rule.good {
            let found = (rule.finds)(&files(example));
            assert!(found.is_empty(), "{}: {found:?} in {example:?}", rule.says);
        }
    }
}

impl File {
    fn is_under(&self, folders: &[&str]) -> bool {
        self.path.split_once('/').is_some_and(|(top, _)| folders.contains(&top))
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_source(&self) -> bool {
        self.is_rust() || self.path.ends_with(".wgsl")
    }

    fn lines(&self) -> usize {
        self.text.lines().count()
    }

    /// The text without line comments, line numbers unchanged.
    fn code(&self) -> String {
        let code = |line| str::split(line, "//").next().unwrap_or(line);
        self.text.lines().map(code).collect::<Vec<_>>().join("\n")
    }
}

/// `path:line: text` of every source line for which `broken(path, line)`.
fn find_lines(files: &[File], broken: fn(&str, &str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_source()) {
        for (i, line) in file.text.lines().enumerate().filter(|(_, l)| broken(&file.path, l)) {
            found.push(format!("{}:{}: {}", file.path, i + 1, line.trim()));
        }
    }
    found
}

/// As `find_lines`, over the code of Rust files.
fn rust_lines(files: &[File], broken: fn(&str, &str) -> bool) -> Vec<String> {
    let code = |f: &File| File { path: f.path.clone(), text: f.code() };
    let rust = |f: &&File| f.is_rust() && f.path != THIS;
    find_lines(&files.iter().filter(rust).map(code).collect::<Vec<_>>(), broken)
}

/// What stands before and after each place where `word` is a whole word of `text`.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .map(move |(i, _)| (&text[..i], &text[i + word.len()..]))
        .filter(move |(before, after)| !before.ends_with(in_word) && !after.starts_with(in_word))
}

/// The paths below `root` (such as `crate`) in Rust code, groups taken apart, with their lines.
fn paths_below(root: &str, code: &str) -> Vec<(usize, String)> {
    let mut paths = Vec::new();
    for (before, after) in words(code, root) {
        let Some(rest) = after.strip_prefix("::") else { continue };
        let line = before.lines().count().max(1);
        let end = rest.find(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
        let (path, rest) = rest.split_at(end.unwrap_or(rest.len()));
        let is_group = rest.starts_with('{') && (path.is_empty() || path.ends_with("::"));
        let all = if is_group { expand(&format!("{path}{rest}")) } else { vec![path.to_string()] };
        paths.extend(all.into_iter().map(|path| (line, path)));
    }
    paths
}

/// `a::{b, c::{d}}` as `a::b` and `a::c::d`; what follows the group is dropped.
fn expand(path: &str) -> Vec<String> {
    let Some((prefix, group)) = path.split_once('{') else { return vec![path.to_string()] };
    let (mut items, mut depth) = (vec![String::new()], 0);
    for c in group.chars().filter(|c| !c.is_whitespace()) {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                items.last_mut().expect("never empty").push(c);
            }
        }
    }
    items.iter().flat_map(|i| expand(i)).map(|i| format!("{prefix}{i}")).collect()
}

/// Whether `path` is `module` or something inside it.
fn is_in(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn wrong_imports(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    for (layer, allowed) in LAYERS {
        let folder = format!("src/{layer}/");
        for file in files.iter().filter(|f| f.path.starts_with(&folder) && f.is_rust()) {
            let code = file.code();
            let mut paths = paths_below("crate", &code);
            if file.path == format!("{folder}mod.rs") {
                paths.extend(paths_below("super", &code));
            }
            let is_layer = |path: &str| LAYERS.iter().any(|(l, _)| is_in(path, l));
            let is_outer = |path: &str| is_in(path, "cli") || is_layer(path);
            paths.retain(|(_, p)| is_outer(p) && !is_in(p, layer));
            paths.retain(|(_, p)| !allowed.iter().any(|a| is_in(p, a)));
            found.extend(paths.iter().map(|(i, p)| format!("{}:{i}: crate::{p}", file.path)));
        }
    }
    found
}

fn engine_effects(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.path.starts_with("src/engine/")) {
        for (i, path) in paths_below("std", &file.code()) {
            let acts = ["env", "fs", "io", "net", "process", "thread"];
            let clock =
                is_in(&path, "time") && (path.contains("Instant") || path.contains("System"));
            if clock || acts.iter().any(|a| is_in(&path, a)) {
                found.push(format!("{}:{i}: std::{path}", file.path));
            }
        }
    }
    found
}

fn unpaired_shaders(files: &[File]) -> Vec<String> {
    let stems = |folder, ending| -> Vec<&str> {
        files
            .iter()
            .filter_map(|f| f.path.strip_prefix(folder)?.strip_suffix(ending))
            .filter(|s: &&str| !s.contains('/') && !SHARED_BY_KERNELS.contains(s))
            .collect()
    };
    let (shaders, kernels) = (stems("shaders/", ".wgsl"), stems("src/kernels/", ".rs"));
    let lone_shaders = shaders.iter().filter(|s| !kernels.contains(s));
    let lone_kernels = kernels.iter().filter(|s| !shaders.contains(s));
    lone_shaders
        .map(|s| format!("shaders/{s}.wgsl"))
        .chain(lone_kernels.map(|s| format!("src/kernels/{s}.rs")))
        .collect()
}

fn orphans(files: &[File]) -> Vec<String> {
    let is_root = |path: &str| ["src/lib.rs", "src/main.rs", "tests/main.rs"].contains(&path);
    let declares = |parent: &str, module: &str| {
        let line = format!("mod {module};");
        let parent = files.iter().find(|f| f.path == parent);
        parent.is_some_and(|f| f.code().lines().any(|l| l.trim_end().ends_with(&line)))
    };
    let is_orphan = |f: &&File| {
        let Some(path) = f.path.strip_suffix(".rs") else { return false };
        let path = path.strip_suffix("/mod").unwrap_or(path);
        let Some((folder, module)) = path.rsplit_once('/') else { return false };
        let parents = match folder {
            "src" => ["src/lib.rs".to_string(), "src/main.rs".to_string()],
            _ => [format!("{folder}/mod.rs"), format!("{folder}.rs")],
        };
        let top = folder == "tests" && declares("tests/main.rs", module);
        !top && !parents.iter().any(|p| declares(p, module))
    };
    let modules = files.iter().filter(|f| f.is_under(&["src", "tests"]) && !is_root(&f.path));
    modules.filter(is_orphan).map(|f| f.path.clone()).collect()
}

fn unknown_verbs(files: &[File]) -> Vec<String> {
    let text = |path| files.iter().find(|f| f.path == path).map_or("", |f| f.text.as_str());
    let cases = text("x").split_once("case $verb in").map_or("", |(_, cases)| cases);
    let arms = cases.lines().filter_map(|line| line.split_once(')'));
    let known: Vec<&str> = arms.flat_map(|(arm, _)| arm.split('|').map(str::trim)).collect();
    text("README.md")
        .split("./x ")
        .skip(1)
        .filter_map(|after| after.split(|c: char| !c.is_ascii_lowercase()).next())
        .filter(|verb| !verb.is_empty() && !known.contains(verb))
        .map(|verb| format!("README.md: ./x {verb}"))
        .collect()
}

/// Every source file, and the two that the last rule compares.
fn read_tree() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for top in ["src", "shaders", "tests", "benches", "web-demo", "build.rs", "README.md", "x"] {
        read_into(&mut files, root, top);
    }
    files
}

fn read_into(files: &mut Vec<File>, root: &Path, path: &str) {
    let full = root.join(path);
    if full.is_dir() {
        for entry in fs::read_dir(&full).unwrap_or_else(|e| panic!("{path}: {e}")) {
            let name = entry.unwrap_or_else(|e| panic!("{path}: {e}")).file_name();
            let name = name.to_string_lossy();
            if !["target", "node_modules"].contains(&&*name) && !name.starts_with('.') {
                read_into(files, root, &format!("{path}/{name}"));
            }
        }
        return;
    }
    let file = File { path: path.to_string(), text: String::new() };
    if full.exists() && (file.is_source() || ["README.md", "x"].contains(&path)) {
        let text = fs::read_to_string(&full).unwrap_or_else(|e| panic!("{path}: {e}"));
        files.push(File { text, ..file });
    }
}
