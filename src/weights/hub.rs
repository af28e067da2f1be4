//! Checkpoints of the Hugging Face hub, by `owner/name`, in the hub's standard cache layout.
//!
//! Owns the choice of files and the cache look-up without a network, which the client crate
//! lacks; the transfers are the client's. What the files hold is the business of [`Checkpoint`].
//!
//! [`Checkpoint`]: super::Checkpoint

use std::{
    ffi::OsString,
    fmt, fs,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiRepo},
};

use super::{
    Directory, WeightsError,
    checkpoint::{INDEX_FILE, SINGLE_FILE, read_index},
};

/// Files beside the weights that are taken where a model has them.
const OPTIONAL_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

/// The file that every model has.
const CONFIG_FILE: &str = "config.json";

/// How a model id is looked up.
#[derive(Clone)]
pub struct HubOptions {
    /// Branch, tag or commit.
    pub revision: String,
    /// Access token for gated and private models; `None`: the one of a stored login, if any.
    pub token: Option<String>,
    /// The cache's `hub` directory.
    pub cache_dir: PathBuf,
    /// Address of the hub; `None`: the public one.
    pub endpoint: Option<String>,
    /// Look in the cache only.
    pub offline: bool,
}

/// Without the token, which must not reach a log.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "set"))
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            .field("offline", &self.offline)
            .finish()
    }
}

impl HubOptions {
    /// Options from the environment, as the hub's own tools read it: HF_TOKEN, HF_HUB_CACHE,
    /// HF_HOME, XDG_CACHE_HOME, HF_ENDPOINT, HF_HUB_OFFLINE; revision `main`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// [`from_env`](Self::from_env) over any set of variables.
    fn from_vars(var: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name)?.into_string().ok().map(|text| text.trim().to_owned());
        let dir = |name: &str| set(name).map(PathBuf::from);
        let cache_dir = dir("HF_HUB_CACHE").unwrap_or_else(|| {
            let caches = || dir("XDG_CACHE_HOME").or_else(|| Some(home?.join(".cache")));
            dir("HF_HOME")
                .or_else(|| Some(caches()?.join("huggingface")))
                .unwrap_or_default()
                .join("hub")
        });
        let offline = text("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "true", "yes", "on"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
        });
        Self {
            revision: "main".into(),
            token: text("HF_TOKEN"),
            cache_dir,
            endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            offline,
        }
    }
}

/// The directory of a model's snapshot, with everything needed to run it; its last component is
/// the resolved commit. Downloads what the cache lacks, with progress bars where stderr is a
/// terminal; a commit that is complete in the cache is not asked for again.
///
/// # Errors
/// [`WeightsError::HubInput`] for an id or a revision that is none, [`WeightsError::NotCached`]
/// where a file is absent offline, [`WeightsError::Download`] for all that fails on the way.
pub fn resolve(id: &str, options: &HubOptions) -> Result<PathBuf, WeightsError> {
    check_id(id)?;
    check_revision(&options.revision)?;
    if options.offline {
        return cached(id, options);
    }
    if is_commit(&options.revision)
        && let Ok(snapshot) = cached(id, options)
    {
        return Ok(snapshot);
    }
    download(id, options)
}

/// `owner/name` of plain parts. `--` stands for `/` in the cache's directory names.
fn check_id(id: &str) -> Result<(), WeightsError> {
    let parts = id.split_once('/');
    let is_id = parts.is_some_and(|(owner, name)| is_plain(owner) && is_plain(name));
    if is_id && id.len() <= 200 && !id.contains("--") {
        return Ok(());
    }
    let cause = "give owner/name as on the hub, or the path of a local directory";
    Err(WeightsError::HubInput { what: "model id", text: id.into(), cause: cause.into() })
}

/// A branch, tag or commit that is safe as a path below the cache's `refs`.
fn check_revision(revision: &str) -> Result<(), WeightsError> {
    if revision.split('/').all(is_plain) && revision.len() <= 200 {
        return Ok(());
    }
    let cause = "give a branch, a tag or a commit of the model".into();
    Err(WeightsError::HubInput { what: "revision", text: revision.into(), cause })
}

/// Whether a part of a path is letters, digits, `-`, `_` and `.`, and cannot lead elsewhere.
fn is_plain(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let leads_on = part.is_empty() || part.starts_with(['.', '-']) || part.contains("..");
    !leads_on && part.chars().all(plain)
}

/// Whether a revision is a full commit hash, which never changes its files.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Directory of a model in the cache.
fn model_dir(id: &str, options: &HubOptions) -> PathBuf {
    options.cache_dir.join(Repo::model(id.into()).folder_name())
}

/// The snapshot in the cache: refs/<revision> holds the commit, snapshots/<commit> the files.
fn cached(id: &str, options: &HubOptions) -> Result<PathBuf, WeightsError> {
    let absent = |what: String| WeightsError::NotCached {
        id: id.into(),
        revision: options.revision.clone(),
        cache: options.cache_dir.clone(),
        what,
    };
    let model_dir = model_dir(id, options);
    let mut commit = options.revision.clone();
    let reference = model_dir.join("refs").join(&options.revision);
    if let Ok(file) = fs::File::open(&reference) {
        commit.clear();
        let read = file.take(256).read_to_string(&mut commit);
        read.map_err(|cause| WeightsError::Io { path: reference.clone(), cause })?;
        commit = commit.trim().into();
    }
    if !is_commit(&commit) {
        return Err(absent(format!("refs/{}", options.revision)));
    }
    let snapshot = model_dir.join("snapshots").join(&commit);
    let has = |file: &str| snapshot.join(file).is_file();
    if !has(CONFIG_FILE) {
        return Err(absent(CONFIG_FILE.into()));
    }
    if has(SINGLE_FILE) {
        return Ok(snapshot);
    }
    if !has(INDEX_FILE) {
        return Err(absent(format!("{SINGLE_FILE} or {INDEX_FILE}")));
    }
    let shards = read_index(&Directory(snapshot.clone()), &snapshot)?.unwrap_or_default();
    match shards.into_keys().find(|shard| !has(shard)) {
        Some(shard) => Err(absent(shard)),
        None => Ok(snapshot),
    }
}

/// Fetches what the cache lacks of the commit that the revision stands for now.
fn download(id: &str, options: &HubOptions) -> Result<PathBuf, WeightsError> {
    let failed = |what: &str, cause: String| WeightsError::Download {
        id: id.into(),
        revision: options.revision.clone(),
        what: what.into(),
        cause,
    };
    let cache = Cache::new(options.cache_dir.clone());
    let mut builder =
        ApiBuilder::from_cache(cache.clone()).with_progress(std::io::stderr().is_terminal());
    if let Some(token) = &options.token {
        builder = builder.with_token(Some(token.clone()));
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().map_err(|e| failed("the client", e.to_string()))?;
    let at = |revision: &str| Repo::with_revision(id.into(), RepoType::Model, revision.into());
    let info = api.repo(at(&options.revision)).info();
    let info = info.map_err(|e| failed("the file list", e.to_string()))?;
    if !is_commit(&info.sha) {
        return Err(failed("the file list", format!("its commit is {:?}", info.sha)));
    }
    // Files are asked for by commit: a branch that moves meanwhile must not mix two versions.
    let repo = api.repo(at(&info.sha));
    let snapshot = model_dir(id, options).join("snapshots").join(&info.sha);
    let fetch = |file: &str| fetch(&repo, &snapshot, file).map_err(|e| failed(file, e));
    let offered = |file: &str| info.siblings.iter().any(|sibling| sibling.rfilename == file);
    fetch(CONFIG_FILE)?;
    for file in OPTIONAL_FILES.into_iter().filter(|file| offered(file)) {
        fetch(file)?;
    }
    if offered(SINGLE_FILE) {
        fetch(SINGLE_FILE)?;
    } else if offered(INDEX_FILE) {
        fetch(INDEX_FILE)?;
        let shards = read_index(&Directory(snapshot.clone()), &snapshot)?.unwrap_or_default();
        for shard in shards.keys() {
            fetch(shard)?;
        }
    } else {
        return Err(failed(SINGLE_FILE, "the model offers no safetensors weights".into()));
    }
    // Written last: the revision is in the cache once all of its files are.
    cache
        .repo(at(&options.revision))
        .create_ref(&info.sha)
        .map_err(|cause| WeightsError::Io { path: model_dir(id, options).join("refs"), cause })?;
    Ok(snapshot)
}

/// Downloads one file unless the snapshot has it.
fn fetch(repo: &ApiRepo, snapshot: &Path, file: &str) -> Result<(), String> {
    if snapshot.join(file).is_file() {
        return Ok(());
    }
    repo.download(file).map(|_| ()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::TcpListener,
        sync::{Arc, Mutex},
    };

    use tempfile::TempDir;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn options(cache: &TempDir) -> HubOptions {
        HubOptions {
            revision: "main".into(),
            token: None,
            cache_dir: cache.path().into(),
            endpoint: None,
            offline: true,
        }
    }

    /// A cache with one model at `main` that has these files.
    fn cache(files: &[(&str, &str)]) -> TempDir {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--owner--name");
        let snapshot = model.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), format!("{COMMIT}\n")).unwrap();
        for (name, text) in files {
            fs::write(snapshot.join(name), text).unwrap();
        }
        cache
    }

    fn error(id: &str, options: &HubOptions) -> String {
        resolve(id, options).unwrap_err().to_string()
    }

    #[test]
    fn a_cached_model_resolves_by_branch_and_by_commit() {
        let cache = cache(&[("config.json", "{}"), (SINGLE_FILE, "")]);
        let mut options = options(&cache);
        let snapshot = resolve("owner/name", &options).unwrap();
        assert_eq!(snapshot.file_name().unwrap(), COMMIT);
        assert!(snapshot.join("config.json").is_file());
        options.revision = COMMIT.into();
        assert_eq!(resolve("owner/name", &options).unwrap(), snapshot);
        // A commit cannot change: no network is needed where all of it is there.
        options.offline = false;
        assert_eq!(resolve("owner/name", &options).unwrap(), snapshot);
    }

    #[test]
    fn an_absent_model_or_revision_is_not_cached() {
        let cache = cache(&[("config.json", "{}"), (SINGLE_FILE, "")]);
        let mut options = options(&cache);
        let text = error("owner/other", &options);
        assert!(text.contains("\"owner/other\"") && text.contains("HF_HUB_OFFLINE"), "{text}");
        options.revision = "v2".into();
        assert!(error("owner/name", &options).contains("refs/v2"));
        options.revision = COMMIT.replace('0', "f");
        assert!(error("owner/name", &options).contains("config.json is absent"));
    }

    #[test]
    fn an_incomplete_snapshot_names_the_absent_file() {
        let config = ("config.json", "{}");
        let index = (INDEX_FILE, r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#);
        let first = ("1.safetensors", "");
        for (files, what) in [
            (&[][..], "config.json"),
            (&[config][..], SINGLE_FILE),
            (&[config, index], "1.safetensors"),
            (&[config, index, first], "2.safetensors"),
        ] {
            let text = error("owner/name", &options(&cache(files)));
            assert!(text.contains(what) && text.contains("not complete"), "{text}");
        }
        let cache = cache(&[config, index, first, ("2.safetensors", "")]);
        assert!(resolve("owner/name", &options(&cache)).is_ok());
    }

    #[test]
    fn a_hostile_cache_does_not_lead_out_of_it() {
        let cache = cache(&[("config.json", "{}"), (SINGLE_FILE, "")]);
        for text in ["../../..", "", "/etc", "main"] {
            fs::write(cache.path().join("models--owner--name/refs/main"), text).unwrap();
            assert!(error("owner/name", &options(&cache)).contains("refs/main is absent"));
        }
    }

    #[test]
    fn ids_are_owner_and_name() {
        for id in ["Qwen/Qwen3-30B-A3B", "a/b", "deepseek-ai/DeepSeek-V2-Lite", "o_1/n.2"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        let long = format!("a/{}", "b".repeat(300));
        for id in [
            "", "gpt2", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "a b/c", "a/b\n", "a\\b/c",
            "a/b?x", "-a/b", "a--b/c", "a/b..c", "ä/b", "./x", &long,
        ] {
            let text = check_id(id).unwrap_err().to_string();
            assert!(text.contains("owner/name") && text.contains(&format!("{id:?}")), "{text}");
        }
    }

    #[test]
    fn revisions_are_plain_paths() {
        for revision in ["main", "refs/pr/3", "v1.0", COMMIT] {
            assert!(check_revision(revision).is_ok(), "{revision}");
        }
        for revision in ["", "..", "a/../b", "/etc", "a//b", "a/", "-x", "a b", "a\\b", "main\n"] {
            let text = check_revision(revision).unwrap_err().to_string();
            assert!(text.contains("revision") && text.contains("branch"), "{text}");
        }
    }

    #[test]
    fn the_environment_is_read_as_the_hub_tools_do() {
        let read = |vars: &[(&str, &str)]| {
            let find = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
            HubOptions::from_vars(find, Some("/home/u".into()))
        };
        let plain = read(&[("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!(plain.cache_dir, Path::new("/home/u/.cache/huggingface/hub"));
        assert!(plain.token.is_none() && !plain.offline && plain.revision == "main");
        assert_eq!(read(&[("XDG_CACHE_HOME", "/x")]).cache_dir, Path::new("/x/huggingface/hub"));
        assert_eq!(read(&[("HF_HOME", "/h")]).cache_dir, Path::new("/h/hub"));
        let all = read(&[
            ("HF_HOME", "/h"),
            ("HF_HUB_CACHE", "/c"),
            ("HF_TOKEN", " t\n"),
            ("HF_ENDPOINT", "https://mirror/"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!((all.cache_dir.as_path(), all.token.as_deref()), (Path::new("/c"), Some("t")));
        assert!(!format!("{all:?}").contains("\"t\""));
        assert!(all.offline && all.endpoint.as_deref() == Some("https://mirror"));
    }

    /// A hub on this machine with `owner/name` at `COMMIT`: its address and the paths asked for.
    fn hub(files: &'static [(&str, &str)]) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let path = head[0].split(' ').nth(1).unwrap().to_owned();
                let (status, body) = answer(files, &path);
                let reply = format!(
                    "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {n}\r\n\
                     ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
                     Content-Range: bytes 0-0/{n}\r\n\r\n{body}",
                    n = body.len(),
                    etag = path.replace('/', "-"),
                );
                log.lock().unwrap().push(path);
                let _ = stream.write_all(reply.as_bytes());
            }
        });
        (address, asked)
    }

    fn answer(files: &[(&str, &str)], path: &str) -> (&'static str, String) {
        if path == "/api/models/owner/name/revision/main" {
            let names = files.iter().map(|(name, _)| format!(r#"{{"rfilename":"{name}"}}"#));
            let names = names.collect::<Vec<_>>().join(",");
            return ("200 OK", format!(r#"{{"sha":"{COMMIT}","siblings":[{names}]}}"#));
        }
        let name = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"));
        match files.iter().find(|(file, _)| Some(*file) == name) {
            Some((_, text)) => ("206 Partial Content", (*text).into()),
            None => ("404 Not Found", String::new()),
        }
    }

    #[test]
    fn a_download_takes_what_is_needed_and_only_once() {
        let (endpoint, asked) = hub(&[
            ("config.json", "{ }"),
            ("README.md", "not needed"),
            ("tokenizer.json", "{}"),
            (INDEX_FILE, r#"{"weight_map":{"a":"1.safetensors"}}"#),
            ("1.safetensors", "weights"),
        ]);
        let cache = tempfile::tempdir().unwrap();
        let mut options = options(&cache);
        (options.offline, options.endpoint) = (false, Some(endpoint));
        let snapshot = resolve("owner/name", &options).unwrap();
        assert_eq!(snapshot.file_name().unwrap(), COMMIT);
        assert_eq!(fs::read_to_string(snapshot.join("1.safetensors")).unwrap(), "weights");
        assert!(snapshot.join("tokenizer.json").is_file() && !snapshot.join("README.md").exists());
        let n_asked = asked.lock().unwrap().len();
        assert_eq!(resolve("owner/name", &options).unwrap(), snapshot);
        assert_eq!(asked.lock().unwrap().len(), n_asked + 1, "the file list alone");
        options.offline = true;
        assert_eq!(resolve("owner/name", &options).unwrap(), snapshot);
        assert_eq!(asked.lock().unwrap().len(), n_asked + 1);
    }

    #[test]
    fn a_failed_download_names_the_file_and_leaves_no_revision() {
        let (endpoint, _) =
            hub(&[("config.json", "{}"), (INDEX_FILE, r#"{"weight_map":{"a":"gone"}}"#)]);
        let cache = tempfile::tempdir().unwrap();
        let mut options = options(&cache);
        (options.offline, options.endpoint) = (false, Some(endpoint));
        let text = error("owner/name", &options);
        assert!(text.contains("cannot download gone of \"owner/name\""), "{text}");
        assert!(text.contains("404") && text.contains("HF_TOKEN"), "{text}");
        assert!(!cache.path().join("models--owner--name/refs/main").exists());
        let text = error("owner/other", &options);
        assert!(text.contains("the file list of \"owner/other\""), "{text}");
    }
}
