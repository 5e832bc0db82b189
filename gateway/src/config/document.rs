//! One TOML file read into a typed mirror, with every problem found in one pass, each with its place.
//!
//! serde stops at its first error. So that one run tells them all, the offending entry is noted, replaced by its default
//! (or taken out), and the rest is read again, until nothing is left to complain of.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

/// The most problems told of one file: beyond that it is probably not the file that was meant.
const PROBLEMS_MAX: usize = 50;

/// The span of what did not come from the file.
const DEFAULTED: Range<usize> = usize::MAX..usize::MAX;

/// Something wrong in a file, and where.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// From 1; 0 where the file could not be read at all.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.message),
            line => write!(f, "{}:{line}:{}: {}", self.file.display(), self.column, self.message),
        }
    }
}

/// The largest TOML file. Two hundred regions fit into one.
const FILE_MAX: u64 = 16 << 20;

/// Makes sure that reading a path ends: a pipe would be waited for, and a device read, for ever.
///
/// # Errors
/// Something else than a file, or one that is too large. What is not there is for the reader to find.
pub(super) fn regular(path: &Path, bytes_max: u64) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => Err("it is no regular file".into()),
        Ok(metadata) if metadata.len() > bytes_max => {
            Err(format!("it has {} bytes; {bytes_max} are the most that is read", metadata.len()))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

/// A file that has been read.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) file: PathBuf,
    pub(super) text: String,
}

impl Document {
    pub(super) fn read(file: &Path) -> Result<Document, Problem> {
        regular(file, FILE_MAX).map_err(|message| Problem { file: file.to_owned(), line: 0, column: 0, message })?;
        match std::fs::read_to_string(file) {
            Ok(text) => Ok(Document { file: file.to_owned(), text }),
            Err(error) => Err(Problem {
                file: file.to_owned(),
                line: 0,
                column: 0,
                message: match error.kind() {
                    std::io::ErrorKind::NotFound => "there is no such file".into(),
                    std::io::ErrorKind::InvalidData => "it is not UTF-8 text".into(),
                    _ => format!("it cannot be read: {error}"),
                },
            }),
        }
    }

    /// Reads the mirror over its defaults: `lay_defaults` lays them under what the file says. `None` if anything is wrong,
    /// which `problems` then tells.
    pub(super) fn parse<'i, T: DeserializeOwned>(
        &'i self,
        lay_defaults: impl Fn(&mut DeTable<'i>),
        problems: &mut Vec<Problem>,
    ) -> Option<T> {
        let (mut root, syntax) = DeTable::parse_recoverable(&self.text);
        if !syntax.is_empty() {
            problems.extend(syntax.iter().take(PROBLEMS_MAX).map(|error| self.problem_of(error)));
            return None;
        }
        // Keys whose absence is our doing, or is explained by a misspelt one.
        let mut excused: Vec<String> = Vec::new();
        let mut clean = true;
        for _ in 0..PROBLEMS_MAX {
            // Again after each problem: the default stands in for an entry that was taken out.
            lay_defaults(root.get_mut());
            let error = match T::deserialize(Deserializer::from(root.clone())) {
                Ok(value) => return clean.then_some(value),
                Err(error) => error,
            };
            clean = false;
            let missing = quoted(error.message(), "missing field `");
            if missing.is_none_or(|key| !excused.iter().any(|excused| excused == key)) {
                let problem = self.problem_of(&error);
                if problems.last() == Some(&problem) {
                    // It is in the defaults that were laid in, whence nothing can be taken out.
                    break;
                }
                problems.push(problem);
            }
            excused.extend(quoted(error.message(), "unknown field `").and_then(|key| meant(key, error.message())));
            match error.span().and_then(|span| remove(root.get_mut(), &span)) {
                Some(key) => excused.push(key),
                None => break,
            }
        }
        None
    }

    /// A problem with the entry at `path` (keys, and numbers for places in arrays), or with its nearest ancestor in the
    /// file.
    pub(super) fn problem(&self, path: &[&str], message: impl Into<String>) -> Problem {
        let root = DeTable::parse_recoverable(&self.text).0;
        self.problem_at(locate(root.get_ref(), path), message.into())
    }

    fn problem_of(&self, error: &toml::de::Error) -> Problem {
        self.problem_at(error.span(), explain(error.message()))
    }

    fn problem_at(&self, span: Option<Range<usize>>, message: String) -> Problem {
        let at = span.map_or(0, |span| span.start).min(self.text.len());
        let before = self.text.get(..at).unwrap_or("");
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Problem {
            file: self.file.clone(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            message,
        }
    }
}

/// Lays `defaults` under `table`: what the table does not say is taken from them, tables by their entries.
pub(super) fn lay_under<'i>(table: &mut DeTable<'i>, defaults: &DeTable<'i>) {
    for (key, default) in defaults {
        match table.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut) {
            None => {
                table.insert(Spanned::new(DEFAULTED, key.get_ref().clone()), unspanned(default));
            }
            Some(DeValue::Table(table)) => {
                if let DeValue::Table(defaults) = default.get_ref() {
                    lay_under(table, defaults);
                }
            }
            Some(_) => {}
        }
    }
}

/// A copy that claims no place in the file.
fn unspanned<'i>(value: &Spanned<DeValue<'i>>) -> Spanned<DeValue<'i>> {
    let value = match value.get_ref() {
        DeValue::Table(table) => {
            let mut copy = DeTable::new();
            lay_under(&mut copy, table);
            DeValue::Table(copy)
        }
        value => value.clone(),
    };
    Spanned::new(DEFAULTED, value)
}

/// Takes out the innermost entry at `span` and gives its key, or an empty one for an item of an array. `None` if there is
/// no such entry.
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let mut found = None;
    for (key, value) in table.iter_mut() {
        // An entry's own span may be its table's header, so what lies within comes first.
        if let Some(key) = within(value.get_mut(), span) {
            return Some(key);
        }
        if key.span() == *span || value.span() == *span {
            found = Some(key.get_ref().to_string());
            break;
        }
    }
    let key = found?;
    table.remove(key.as_str())?;
    Some(key)
}

/// [`remove`] among the value's own entries.
fn within(value: &mut DeValue<'_>, span: &Range<usize>) -> Option<String> {
    match value {
        DeValue::Table(table) => remove(table, span),
        DeValue::Array(array) => {
            if let Some(key) = array.iter_mut().find_map(|item| within(item.get_mut(), span)) {
                return Some(key);
            }
            let before = array.len();
            let items = std::mem::replace(array, toml::de::DeArray::new()).into_iter();
            *array = items.filter(|item| item.span() != *span).collect();
            (array.len() < before).then(String::new)
        }
        _ => None,
    }
}

fn locate(root: &DeTable<'_>, path: &[&str]) -> Option<Range<usize>> {
    let mut table = Some(root);
    let mut array: Option<&toml::de::DeArray<'_>> = None;
    let mut span = None;
    for step in path {
        let value = match (table, array) {
            (Some(table), _) => {
                let Some((key, value)) = table.get_key_value(*step) else { break };
                span = Some(key.span());
                value
            }
            (None, Some(array)) => {
                let Some(value) = step.parse::<usize>().ok().and_then(|at| array.get(at)) else { break };
                span = Some(value.span());
                value
            }
            (None, None) => break,
        };
        table = value.get_ref().as_table();
        array = value.get_ref().as_array();
    }
    span
}

/// Turns serde's words into ours, and names the key that was probably meant.
fn explain(message: &str) -> String {
    let Some(unknown) = quoted(message, "unknown field `") else { return message.to_owned() };
    match meant(unknown, message) {
        Some(key) => format!("unknown key `{unknown}`, did you mean `{key}`?"),
        None => format!("unknown key `{unknown}`; known here: {}", known(message).collect::<Vec<_>>().join(", ")),
    }
}

/// What stands between the backquotes after `prefix`.
fn quoted<'m>(message: &'m str, prefix: &str) -> Option<&'m str> {
    message.strip_prefix(prefix)?.split('`').next()
}

/// The keys that serde says it would have known.
fn known(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(3).step_by(2)
}

/// The known key that is nearest to an unknown one, if it is near.
fn meant(unknown: &str, message: &str) -> Option<String> {
    let nearest = known(message).map(|key| (strsim::damerau_levenshtein(unknown, key), key)).min()?;
    (nearest.0 <= 1 + unknown.len() / 4).then(|| nearest.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Mirror {
        name: String,
        latitude: f64,
        inner: Inner,
        #[serde(default)]
        items: Vec<Inner>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        count: u32,
    }

    const DEFAULTS: &str = "latitude = 1.5\n[inner]\ncount = 7\n";

    fn parse(text: &str) -> (Option<Mirror>, Vec<(usize, usize, String)>) {
        let document = Document { file: "x.toml".into(), text: text.into() };
        let mut problems = Vec::new();
        let mirror =
            document.parse(|table| lay_under(table, DeTable::parse(DEFAULTS).expect("valid").get_ref()), &mut problems);
        (mirror, problems.into_iter().map(|p| (p.line, p.column, p.message)).collect())
    }

    #[test]
    fn defaults_fill_what_the_file_leaves_out() {
        let (mirror, problems) = parse("name = \"a\"\n[[items]]\ncount = 1\n");
        let mirror = mirror.expect("valid");
        assert_eq!((mirror.name.as_str(), mirror.latitude, mirror.inner.count), ("a", 1.5, 7));
        assert_eq!(mirror.items[0].count, 1);
        assert!(problems.is_empty());
    }

    #[test]
    fn every_problem_is_told_at_once_with_its_place() {
        let text = "name = 3\nlattitude = 2.0\n[inner]\ncount = -1\n\"küche\" = 1\n[[items]]\ncount = \"x\"\n";
        let (mirror, mut problems) = parse(text);
        assert!(mirror.is_none());
        problems.sort();
        let places: Vec<_> = problems.iter().map(|(line, column, _)| (*line, *column)).collect();
        assert_eq!(places, [(1, 8), (2, 1), (4, 9), (5, 1), (7, 9)], "{problems:?}");
        assert!(problems.iter().any(|p| p.2 == "unknown key `lattitude`, did you mean `latitude`?"), "{problems:?}");
        assert!(problems.iter().any(|p| p.2.starts_with("unknown key `küche`; known here: ")), "{problems:?}");
    }

    #[test]
    fn broken_syntax_is_told_with_its_place() {
        let (mirror, problems) = parse("name = \"a\"\n[inner\ncount = 1\n");
        assert!(mirror.is_none());
        assert_eq!(problems[0].0, 2, "{problems:?}");
    }

    #[test]
    fn a_path_is_located_or_its_nearest_ancestor_is() {
        let document = Document { file: "x.toml".into(), text: "name = \"a\"\n[[items]]\ncount = 1\n".into() };
        let place = |path: &[&str]| {
            let problem = document.problem(path, "m");
            (problem.line, problem.column)
        };
        assert_eq!(place(&["items", "0", "count"]), (3, 1));
        assert_eq!(place(&["items", "0", "other"]), (2, 1));
        assert_eq!(place(&["absent"]), (1, 1));
    }
}
