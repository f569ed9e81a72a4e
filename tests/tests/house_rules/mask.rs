//! Rust text with the parts blanked that a rule must not look at.
//!
//! A lexer of the few token kinds that can hide a word: comments (nested, doc), strings (raw, byte, C), characters as
//! opposed to lifetimes. A parser crate would know more, but no rule here needs a syntax tree.

/// A Rust source, split into its code and its comments. Both keep the lines and columns of the original.
#[derive(Debug, Clone)]
pub(crate) struct Masked {
    /// The code; comments are blank, every byte of a literal is a `"`.
    pub(crate) code: String,
    /// The comments; all else is blank.
    pub(crate) comments: String,
}

/// The kind of the bytes of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Masked {
    /// Splits `text`. Never fails: text that is not Rust is split somehow.
    pub(crate) fn new(text: &str) -> Masked {
        let bytes = text.as_bytes();
        let mut code = Vec::with_capacity(bytes.len());
        let mut comments = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while at < bytes.len() {
            let (kind, end) = token(bytes, at);
            for &byte in &bytes[at..end] {
                let (in_code, in_comment) = match (byte, kind) {
                    (b'\n', _) => (b'\n', b'\n'),
                    (_, Kind::Code) => (byte, b' '),
                    (_, Kind::Comment) => (b' ', byte),
                    (_, Kind::Literal) => (b'"', b' '),
                };
                code.push(in_code);
                comments.push(in_comment);
            }
            at = end;
        }
        Masked {
            code: String::from_utf8_lossy(&code).into_owned(),
            comments: String::from_utf8_lossy(&comments).into_owned(),
        }
    }
}

/// The kind of the token that starts at `at`, and where it ends (always after `at`).
fn token(bytes: &[u8], at: usize) -> (Kind, usize) {
    let rest = &bytes[at..];
    let starts_word = at == 0 || !is_word(bytes[at - 1]);
    if rest.starts_with(b"//") {
        let length = rest
            .iter()
            .position(|&byte| byte == b'\n')
            .unwrap_or(rest.len());
        return (Kind::Comment, at + length);
    }
    if rest.starts_with(b"/*") {
        return (Kind::Comment, at + block_comment_length(rest));
    }
    if starts_word && let Some(length) = prefixed_string_length(rest) {
        return (Kind::Literal, at + length);
    }
    match rest[0] {
        b'"' => (Kind::Literal, at + quoted_length(rest, b'"')),
        b'\'' => match character_length(rest) {
            Some(length) => (Kind::Literal, at + length),
            None => (Kind::Code, at + 1),
        },
        _ => (Kind::Code, at + 1),
    }
}

fn block_comment_length(rest: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of a string with a prefix (`r"`, `br#"`, `b"`, `c"`, `b'`), or `None` if `rest` is none.
fn prefixed_string_length(rest: &[u8]) -> Option<usize> {
    let prefix = [&b"br"[..], b"cr", b"r", b"b", b"c"]
        .into_iter()
        .find(|prefix| rest.starts_with(prefix))?;
    let mut at = prefix.len();
    if prefix == b"b" && rest.get(at) == Some(&b'\'') {
        return Some(at + quoted_length(&rest[at..], b'\''));
    }
    let is_raw = prefix.ends_with(b"r");
    let mut hashes = 0;
    while is_raw && rest.get(at) == Some(&b'#') {
        hashes += 1;
        at += 1;
    }
    if rest.get(at) != Some(&b'"') {
        return None;
    }
    if !is_raw {
        return Some(at + quoted_length(&rest[at..], b'"'));
    }
    let mut close = vec![b'"'];
    close.resize(hashes + 1, b'#');
    let body = &rest[at + 1..];
    let end = body
        .windows(close.len())
        .position(|window| window == close)
        .map_or(body.len(), |found| found + close.len());
    Some(at + 1 + end)
}

/// The length of a literal that ends at the next `quote` without a backslash before it.
fn quoted_length(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// The length of a character literal, or `None` where the quote starts a lifetime or a label.
fn character_length(rest: &[u8]) -> Option<usize> {
    match *rest.get(1)? {
        b'\\' => Some(quoted_length(rest, b'\'')),
        byte if byte < 0x80 => (rest.get(2) == Some(&b'\'')).then_some(3),
        // One character of two to four bytes; a lifetime of such letters is not worth telling apart.
        _ => rest
            .iter()
            .take(6)
            .skip(1)
            .position(|&byte| byte == b'\'')
            .map(|found| found + 2),
    }
}

/// Whether `byte` can be part of an identifier.
pub(crate) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// The places of `word` in `text` where it is not part of a longer word.
pub(crate) fn find_word<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = text.as_bytes();
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let before = at.checked_sub(1).map(|before| bytes[before]);
            let after = bytes.get(at + word.len()).copied();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
}

/// The identifier at the start of `text`, after white space; empty if there is none.
pub(crate) fn leading_identifier(text: &str) -> &str {
    let text = text.trim_start();
    let end = text
        .bytes()
        .position(|byte| !is_word(byte))
        .unwrap_or(text.len());
    &text[..end]
}

/// The line, counted from 1, of the byte at `offset`.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
}

/// The line, counted from 1, where the file's own test module starts; `None` if it has none.
///
/// Only a module counts: `#[cfg(test)]` on an import at the top does not make the file below it test code.
pub(crate) fn test_module_line(code: &str) -> Option<usize> {
    code.match_indices("#[cfg(test)]").find_map(|(at, mark)| {
        let item = skip_attributes(&code[at + mark.len()..]);
        let name = leading_identifier(item.strip_prefix("mod ")?);
        let opens = item
            .find(['{', ';'])
            .is_some_and(|end| item.as_bytes()[end] == b'{');
        (!name.is_empty() && opens).then(|| line_of(code, at))
    })
}

/// What is left of `code` after any attributes and a visibility at its start.
pub(crate) fn skip_attributes(code: &str) -> &str {
    let mut rest = code.trim_start();
    while rest.starts_with("#[") {
        let end = closing(rest, 1).map_or(rest.len(), |end| end + 1);
        rest = rest[end..].trim_start();
    }
    let Some(public) = rest.strip_prefix("pub") else {
        return rest;
    };
    match public.bytes().next() {
        Some(b'(') => public[closing(public, 0).map_or(0, |end| end + 1)..].trim_start(),
        Some(byte) if byte.is_ascii_whitespace() => public.trim_start(),
        _ => rest,
    }
}

/// The offset of the bracket that closes the one at `open`.
pub(crate) fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_not_code() {
        let text =
            "let a = \"one // two\"; // three\n/* four /* five */ six */ let b = r#\"se\"ven\"#;";
        let masked = Masked::new(text);
        for word in ["one", "two", "three", "four", "five", "six", "ven"] {
            assert!(!masked.code.contains(word), "{word} in {}", masked.code);
        }
        assert!(masked.code.contains("let b ="));
        assert!(masked.comments.contains("three") && masked.comments.contains("six"));
        assert!(!masked.comments.contains("one"));
        assert_eq!(masked.code.len(), text.len());
    }

    #[test]
    fn lifetimes_stay_code_and_characters_do_not() {
        let masked = Masked::new("fn f<'a>(x: &'a str) { g('\\'', '{', b'{', 'é', '\"'); } // end");
        assert!(masked.code.contains("<'a>"));
        assert_eq!(masked.code.matches('{').count(), 1);
        assert!(masked.comments.contains("end"));
    }

    #[test]
    fn an_escaped_quote_does_not_end_a_string() {
        let masked = Masked::new(r#"f("a\"b // c"); g(b"x\\"); h()"#);
        assert!(masked.code.contains("g(") && masked.code.contains("h()"));
        assert!(masked.comments.trim().is_empty());
    }

    #[test]
    fn words_are_whole_words() {
        assert_eq!(
            find_word("unsafe_code unsafe not_unsafe", "unsafe").collect::<Vec<_>>(),
            [12]
        );
    }

    #[test]
    fn a_test_import_is_not_a_test_module() {
        let code = "#[cfg(test)]\nuse x::y;\nfn f() {}\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(test_module_line(code), Some(4));
        assert_eq!(test_module_line("#[cfg(test)]\nmod tests;\n"), None);
    }
}
