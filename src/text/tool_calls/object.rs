//! The JSON object of one call, followed character by character, so that arguments can be passed
//! on before they are complete.

/// What a character brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    More,
    /// The function's name is known.
    Named(String),
    /// The object is complete.
    End,
    /// This is no call, or no JSON.
    Broken,
}

/// Where in the object the next character stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Key,
    InKey,
    Colon,
    Value,
    InValue,
    Comma,
}

/// Keys that may stand in front of the name of what is still a call.
const KEYS: &[&str] = &["name", "arguments", "parameters", "type", "id"];

#[derive(Debug)]
pub(super) struct CallObject {
    /// Everything so far, the mark in front included; kept until the name is known.
    raw: String,
    name: Option<String>,
    at: At,
    key: String,
    /// The current value, unless it is passed on as it comes.
    value: String,
    /// The current value is the arguments' object, passed on as it comes.
    passing: bool,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
}

impl CallObject {
    /// Behind `raw`, in front of the brace.
    pub(super) fn new(raw: String) -> Self {
        Self {
            raw,
            name: None,
            at: At::Start,
            key: String::new(),
            value: String::new(),
            passing: false,
            depth: 0,
            in_string: false,
            escaped: false,
            early: None,
            has_arguments: false,
        }
    }

    pub(super) fn is_named(&self) -> bool {
        self.name.is_some()
    }

    pub(super) fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// Everything as text, if it is no call (yet).
    pub(super) fn into_text(self) -> String {
        self.raw
    }

    /// Takes a character; text of the arguments goes to `arguments`.
    pub(super) fn push(
        &mut self,
        c: char,
        known: &impl Fn(&str) -> bool,
        arguments: &mut String,
    ) -> Step {
        if self.name.is_none() {
            self.raw.push(c);
        }
        // White space counts only inside of strings and values.
        if c.is_ascii_whitespace() && !matches!(self.at, At::InKey | At::InValue) {
            return Step::More;
        }
        match (self.at, c) {
            (At::Start, '{') | (At::Comma, ',') => self.at = At::Key,
            (At::Key, '"') => {
                self.key = "\"".to_owned();
                (self.at, self.in_string) = (At::InKey, true);
            }
            (At::Key | At::Comma, '}') => {
                return if self.is_named() { Step::End } else { Step::Broken };
            }
            (At::InKey, _) => {
                self.key.push(c);
                self.quote(c);
                if !self.in_string {
                    return self.end_key();
                }
            }
            (At::Colon, ':') => self.at = At::Value,
            (At::Value, _) => {
                self.value.clear();
                let arguments_key = matches!(&*self.key, "arguments" | "parameters");
                let first = arguments_key && !self.has_arguments;
                self.passing = first && self.is_named() && c == '{';
                self.has_arguments |= self.passing;
                self.at = At::InValue;
                return self.take_value(c, known, arguments);
            }
            (At::InValue, _) => return self.take_value(c, known, arguments),
            _ => return Step::Broken,
        }
        Step::More
    }

    /// Follows quotes and escapes inside of a string.
    fn quote(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' => self.escaped = true,
            '"' => self.in_string = false,
            _ => {}
        }
    }

    fn end_key(&mut self) -> Step {
        let Ok(key) = serde_json::from_str::<String>(&self.key) else { return Step::Broken };
        if self.name.is_none() && !KEYS.contains(&&*key) {
            return Step::Broken;
        }
        self.key = key;
        self.at = At::Colon;
        Step::More
    }

    fn take_value(
        &mut self,
        c: char,
        known: &impl Fn(&str) -> bool,
        arguments: &mut String,
    ) -> Step {
        let mut ends = false;
        if self.in_string {
            self.quote(c);
            ends = !self.in_string && self.depth == 0;
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                // Behind a number or a word.
                '}' | ']' | ',' if self.depth == 0 => {
                    let step = self.end_value(known, arguments);
                    self.at = At::Comma;
                    return match (step, c) {
                        (Step::More, ',') => {
                            self.at = At::Key;
                            Step::More
                        }
                        (Step::More, '}') if self.is_named() => Step::End,
                        _ => Step::Broken,
                    };
                }
                '}' | ']' => {
                    self.depth -= 1;
                    ends = self.depth == 0;
                }
                _ => {}
            }
        }
        if self.passing {
            arguments.push(c);
        } else {
            self.value.push(c);
        }
        if !ends {
            return Step::More;
        }
        self.at = At::Comma;
        self.end_value(known, arguments)
    }

    fn end_value(&mut self, known: &impl Fn(&str) -> bool, arguments: &mut String) -> Step {
        if std::mem::take(&mut self.passing) {
            return Step::More;
        }
        let value = std::mem::take(&mut self.value);
        match &*self.key {
            "name" if self.name.is_none() => {
                let Ok(name) = serde_json::from_str::<String>(&value) else { return Step::Broken };
                if !known(&name) {
                    return Step::Broken;
                }
                arguments.push_str(&self.early.take().unwrap_or_default());
                self.raw.clear();
                self.name = Some(name.clone());
                Step::Named(name)
            }
            "arguments" | "parameters" if !self.has_arguments => {
                self.has_arguments = true;
                let text = match value.trim() {
                    "null" => "{}".to_owned(),
                    // Some models write the arguments' JSON as a string.
                    text => serde_json::from_str(text).unwrap_or_else(|_| text.to_owned()),
                };
                match self.name {
                    Some(_) => arguments.push_str(&text),
                    None => self.early = Some(text),
                }
                Step::More
            }
            _ => Step::More,
        }
    }
}
