"""Reading YAMLs: mistakes of syntax with their place and remedy, and where a key is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ldm import files
from ldm.util import ConfigError
from ldm.yaml_files import (
    LARGEST,
    _explained,
    check_interpolations,
    find_paths,
    in_checkout,
    line_of,
    parse_yaml,
    place_in,
    read_yaml,
    yaml_value,
)

pytestmark = pytest.mark.refused_first

BROKEN = [
    ("a:\n  b: *\n", 2, 6, '* needs quotes: "*"'),
    ("a: [*, @]\n", 1, 5, '* needs quotes: "*"'),
    ("a: *cat\n", 1, 4, '*cat needs quotes: "*cat"'),
    ("a: @\n", 1, 4, "begins with @ needs quotes"),
    ("a: %x\n", 1, 4, "begins with % needs quotes"),
    ("a: `x`\n", 1, 4, "begins with ` needs quotes"),
    ("a: &\n", 1, 4, "begins with & needs quotes"),
    ("a: > x\n", 1, 4, "begins with > needs quotes"),
    ("a:\n\tb: 1\n", 2, 1, "use spaces"),
    ("a:\n  b: 1\n\tc: 2\n", 3, 1, "use spaces"),
    ('a: "C:\\Users\\me"\n', 1, 8, r"single quotes, 'C:\...', or C:/..."),
    ('a: "D:\\photos"\n', 1, 7, r"single quotes, 'C:\...', or C:/..."),
    ("a: b: c\n", 1, 5, "needs quotes"),
    ("a:\n  b: 1\n  c\n  d: 2\n", 3, 3, "a colon is missing"),
    ("a:\n  b 1\n  d: 2\n", 2, 3, "a colon is missing"),
    ("a:\n  b:1\n  d: 2\n", 2, 5, "a space after the colon"),
    ("a = 1\nb: 2\n", 1, 3, "key: value, with a colon"),
    ("a:\n  b: 1\n   c: 2\n", 3, 5, "nothing may be indented below"),
    ("a:\n   b: 1\n  c: 2\n", 3, 3, "begin in the same column"),
    ('a: "x\nb: 1\nc: "y"\nd: *\n', 1, 4, "this quote is not closed"),
    ("a: 'x\nb: 1\n", 1, 4, "this quote is not closed"),
    ("a: [1, 2\nb: 1\n", 1, 4, "not closed"),
    ("b: 1\na: [", 2, 4, "not closed"),
    ("a: {b: 1\nc: 2\n", 1, 4, "not closed"),
    ("a:\n- {} on a beach\n", 2, 3, 'begins with { needs quotes: "{} ..."'),
    ('a: "x" y\n', 1, 8, "put the whole value in quotes"),
]
LATER = [  # found when the value is built, not when the text is parsed
    ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, 3, "the key 'c' is there twice"),
    ("a: !!python/object:os.system x\n", 1, 4, "begins with ! needs quotes"),
    ("a: 1\n---\nb: 2\n", 2, 1, "a second document"),
    ("? [a]\n: 1\n", 1, 3, "a key must be a text"),
    ("a: &x [*x]\n", 1, 4, "references that hold themselves"),
    ("a: x\0\n", 1, 5, "the control character 0x00"),
    ("a:\n\u00a0b: 1\n", 2, 1, "no plain space"),
]


@pytest.mark.parametrize(("text", "line", "column", "remedy"), BROKEN + LATER)
def test_broken_syntax(text: str, line: int, column: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "'f.yaml'")
    message = str(caught.value)
    # libyaml and the parser in Python name a column before or after an escape.
    places = [
        f"'f.yaml', line {line}, column {column + shift} is not"
        for shift in (0, *([1] if "\\" in text else ()))
    ]
    assert message.startswith(tuple(places)) and remedy in message, message
    assert len(message) < 300 and "\n" not in message


@pytest.mark.parametrize(("text", "line", "column", "remedy"), BROKEN)
def test_the_parser_in_python_leads_to_the_same_words(text: str, line: int, column: int, remedy: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        yaml.compose(text, Loader=yaml.SafeLoader)
    row, _, why = _explained(caught.value, text.splitlines())
    assert row + 1 == line and remedy in why


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# a comment\n", "is empty"),
        ("- a\n", "must hold a mapping"),
        ("words\n", "it holds no key"),
        ("model.params.timesteps=10\n", "it holds no key"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ('model:\n  path: "C:\\new\\toys"\n', r"line 2: model.path is a path whose backslashes"),
        ('model:\n  path: "C:\\Projects\\toys"\n', r"single quotes, 'C:\...', or C:/..."),
        ("a:\n  b: ${\n", "line 2 (a.b) is not a valid YAML: this is no interpolation"),
    ],
)
def test_other_mistakes(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "'f.yaml'")
    assert words in str(caught.value)


def test_references_that_expand_to_very_much() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    with pytest.raises(ConfigError, match="very many others"):
        parse_yaml("\n".join(lines), "'f.yaml'")


@pytest.mark.parametrize(
    "text", ["a: 'C:\\x'\n", 'a: "one: two\n  three"\n', "b: &x [1, 2]\na: *x\n", "a: https://x.y/z\n"]
)
def test_what_is_right(text: str) -> None:
    assert "a" in parse_yaml(text, "'f.yaml'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: caf\xe9\n", "line 1, column 7 is not a valid YAML: the byte 0xe9 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        (b"x" * (LARGEST + 1), "is no YAML: it has more than"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes("a: 1\n".encode("utf-8-sig"))
    assert read_yaml(path) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("${b}", "there is no key 'b'"),
        ("${env:HOME}", "${oc.env:NAME} is a variable"),
        ("${oc.env:NO_SUCH_VARIABLE}", "the variable 'NO_SUCH_VARIABLE' is not set"),
        ("${a}", "write the value"),
    ],
)
def test_unknown_interpolation(value: str, words: str) -> None:
    config = parse_yaml(f"a: {value}\n", "'f.yaml'")
    with pytest.raises(ConfigError) as caught:
        check_interpolations(config, lambda key: " (f.yaml, line 1)" if key == "a" else "")
    assert str(caught.value).startswith(f"a is '{value}' (f.yaml, line 1)") and words in str(caught.value)
    check_interpolations(parse_yaml("a: ${b}\nb: 1\nc: ???\n", ""))


def test_lines_of_keys(tmp_path: Path) -> None:
    text = "a:\n  b:\n    - 1\n    - c: 2\n  d: {e: 3}\n"
    keys = {
        "a": 1,
        "a.b": 2,
        "a.b[0]": 3,
        "a.b[1].c": 4,
        "a.d.e": 5,
        "a.x": None,
        "a.b[7]": None,
        "a.d.e.f": None,
    }
    assert {key: line_of(text, key) for key in keys} == keys
    assert line_of("a: [", "a") is None
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("x: 1\ny: 1\n")
    second.write_text("# later\ny: 2\n")
    assert place_in([first, second], "y") == f" ({second}, line 2)"
    assert place_in([first, second], "x") == f" ({first}, line 1)"
    assert place_in([first, tmp_path / "gone.yaml"], "z") == ""


def test_durations_stay_texts() -> None:
    assert yaml_value("00:12:00:00") == "00:12:00:00" and yaml_value("12:30:00") == "12:30:00"
    assert yaml_value("1e-3") == 1e-3 and yaml_value("7") == 7


# -- paths from another working directory --------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model, a YAML beside its folder and a checkout; the working directory is another one."""
    (tmp_path / "project" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "project" / "models" / "mine" / "text").mkdir()
    (tmp_path / "checkout" / "models" / "shipped").mkdir(parents=True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(files, "CHECKOUT", tmp_path / "checkout")
    return tmp_path / "project"


@pytest.mark.one_reader
def test_a_path_is_found_from_its_yaml_by_its_last_parts_and_in_the_checkout(elsewhere: Path) -> None:
    mine, checkout = elsewhere / "models" / "mine", elsewhere.parent / "checkout"
    assert in_checkout("models/mine/text", [mine]) == str(mine / "text")  # from a folder above
    assert in_checkout("models/moved/text", [mine]) == str(mine / "text")  # by its last parts
    assert in_checkout("models/shipped") == str(checkout / "models" / "shipped")
    assert in_checkout("text") == "text" and in_checkout("models/none") == "models/none"
    Path("models/mine/text").mkdir(parents=True)
    assert in_checkout("models/mine/text", [mine]) == "models/mine/text"  # what is here comes first
    for odd in ("", "a\0b", "models/" + "x" * 5000, "~", "${a}"):
        assert in_checkout(odd, [mine]) == odd


@pytest.mark.one_reader
def test_the_paths_of_a_yaml_are_found_wherever_it_is_read(elsewhere: Path) -> None:
    path = elsewhere / "own.yaml"
    path.write_text(
        "version: models/mine/text\nfolders: [models/shipped, models/none]\nname: text\nother: ${version}\n"
        "later: ???\nnested: {ckpt_path: mine/text, title: mine/text}\n"
    )
    config = read_yaml(path)
    text = str(elsewhere / "models" / "mine" / "text")
    assert config.version == config.other == text and config.name == "text"
    assert config.folders == [str(elsewhere.parent / "checkout" / "models" / "shipped"), "models/none"]
    assert config.nested == {"ckpt_path": "mine/text", "title": "mine/text"}
    find_paths(config, [elsewhere / "models"])
    assert config.nested == {"ckpt_path": text, "title": "mine/text"}
    plain = {"a": [{"tokenizer": "models/mine/text"}]}
    find_paths(plain, [elsewhere])
    assert plain == {"a": [{"tokenizer": text}]}


@pytest.mark.one_reader
def test_a_shipped_yaml_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/latent-diffusion/txt2img-finetune.yaml"
    assert read_yaml(name).model.target and place_in([name], "model.target").startswith(f" ({name}, line ")
