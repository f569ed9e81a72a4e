//! Where the functions of a file are.

use crate::mask::{closing, find_word, leading_identifier, line_of};

/// A function with a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// The line of the word `fn`.
    pub(crate) line: usize,
    /// The line of the closing brace.
    pub(crate) end_line: usize,
    /// Lines of the body that hold code: blank lines and comments are free, as in clippy's `too_many_lines`.
    pub(crate) code_lines: usize,
    /// Whether it carries `#[test]`.
    pub(crate) is_test: bool,
}

/// The functions in masked code, in the order of their start.
pub(crate) fn functions(code: &str) -> Vec<Function> {
    find_word(code, "fn")
        .filter_map(|at| {
            let name = leading_identifier(&code[at + 2..]);
            // A function pointer has no name.
            if name.is_empty() {
                return None;
            }
            let open = body_start(code, at)?;
            let end = closing(code, open)?;
            let body = &code[open + 1..end];
            Some(Function {
                name: name.to_owned(),
                line: line_of(code, at),
                end_line: line_of(code, end),
                code_lines: body.lines().filter(|line| !line.trim().is_empty()).count(),
                is_test: attributes_before(code, at).contains("#[test]"),
            })
        })
        .collect()
}

/// The innermost function around `line`.
pub(crate) fn around(functions: &[Function], line: usize) -> Option<&Function> {
    functions
        .iter()
        .filter(|function| (function.line..=function.end_line).contains(&line))
        .max_by_key(|function| function.line)
}

/// The offset of the brace that opens the body of the function whose `fn` is at `at`; `None` for a declaration.
fn body_start(code: &str, at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (offset, byte) in code.bytes().enumerate().skip(at) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.checked_sub(1)?,
            b'{' if depth == 0 => return Some(offset),
            b';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The text between the end of the previous item and the function: its attributes and qualifiers.
fn attributes_before(code: &str, at: usize) -> &str {
    let start = code[..at].rfind([';', '}', '{']).map_or(0, |end| end + 1);
    &code[start..at]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Masked;

    #[test]
    fn bodies_are_found_and_declarations_are_not() {
        let text = "trait T { fn declared(&self) -> [u8; 4]; }\n#[test]\nfn a() {\n    let f: fn(u8) = g;\n\n    \
                    // comment\n    if x { y() }\n}\nfn b() where X: Y {}\n";
        let found = functions(&Masked::new(text).code);
        let names: Vec<&str> = found.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(
            (found[0].line, found[0].end_line, found[0].code_lines),
            (3, 8, 2)
        );
        assert!(found[0].is_test && !found[1].is_test);
    }

    #[test]
    fn the_innermost_function_is_the_one_around_a_line() {
        let found = functions("fn outer() {\n    fn inner() {\n        x\n    }\n}\n");
        assert_eq!(around(&found, 3).map(|f| f.name.as_str()), Some("inner"));
        assert_eq!(around(&found, 5).map(|f| f.name.as_str()), Some("outer"));
        assert_eq!(around(&found, 6), None);
    }
}
