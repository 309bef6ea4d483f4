"""Facts about configurations: what is read, what is refused, and in which words."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yaml import unsafe_load

from common.config import ConfigError, UserError, command, dump, load, parse, require


@dataclass(frozen=True)
class Data:
    """A section."""

    fraction: float = 1.0
    """part of the images"""
    classes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "data.fraction", self.fraction, "in (0, 1]")


@dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    rate: float = 0.1
    bf16: bool = False
    note: str = ""
    limit: int | None = None
    kind: Literal["small", "large"] = "small"
    folder: Path = Path("runs")
    data: Data = field(default_factory=Data)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a configuration file and gives its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(*argv: str) -> str:
    """The message with which this command line is refused."""
    with pytest.raises(ConfigError) as error:
        parse(Config, argv, prog="train")
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_arguments_every_setting_has_its_default() -> None:
    assert parse(Config, [], prog="train") == Config()


def test_settings_of_a_file_replace_defaults_and_leave_the_others(written: Callable[..., Path]) -> None:
    path = written("seed: 3\ndata:\n  classes: [4, 1]\n")
    assert load(Config, path) == Config(seed=3, data=Data(classes=[4, 1]))


def test_options_after_the_file_override_it_key_by_key(written: Callable[..., Path]) -> None:
    path = written("seed: 3\nrate: 0.5\ndata: {fraction: 0.25, classes: [1]}\n")
    config = parse(Config, ["--config", str(path), "--seed", "4", "--data.fraction", "0.75"], prog="train")
    assert config == Config(seed=4, rate=0.5, data=Data(fraction=0.75, classes=[1]))


def test_a_file_overrides_the_options_before_it(written: Callable[..., Path]) -> None:
    assert parse(Config, ["--seed", "4", f"--config={written('seed: 3')}"], prog="train").seed == 3


def test_the_later_of_two_files_wins_key_by_key(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\ndata: {fraction: 0.5}")
    second.write_text("seed: 2\n")
    config = parse(Config, ["--config", str(first), "--config", str(second)], prog="train")
    assert config == Config(seed=2, data=Data(fraction=0.5))


def test_sys_argv_is_read_where_no_arguments_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "7"])
    assert parse(Config, prog="train").seed == 7


def test_help_shows_the_line_under_a_field_and_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], prog="train")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: train [--config FILE] [--option VALUE ...]\n")
    assert "part of the images" in out and "--seed SEED" in out and "type: int, default: 0" in out
    assert "--kind {small,large}" in out and "Literal" not in out and "configuration file" not in out


def test_help_leaves_out_the_sections_that_a_command_reads_past(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], prog="train", without=["data"])
    out = capsys.readouterr().out
    assert "--data" not in out and "part of the images" not in out and "--seed SEED" in out
    assert parse(Config, ["--data.fraction", "0.25"], prog="train", without=["data"]).data.fraction == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead: 1", "unknown key 'sead'; did you mean 'seed'?"),
        ("data: {fractoin: 0.5}", "unknown key 'data.fractoin'; did you mean 'data.fraction'?"),
        ("data.fraction: 0.5", "unknown key 'data.fraction'; did you mean 'data'?"),
        ("1: 2", "unknown key '1'; allowed: seed, rate, bf16, note, limit, kind, folder, data"),
        ("data: {x: 1}", "unknown key 'data.x'; allowed: fraction, classes"),
        ("config: other.yaml", "unknown key 'config'; allowed: seed, rate, bf16, note, limit, kind, folder, data"),
        ("seed: one", "seed must be int, got 'one'"),
        ("seed: 1.5", "seed must be int, got '1.5'"),
        ("seed: true", "seed must be int, got 'True'"),
        ("bf16: 1", "bf16 must be bool, got '1'"),
        ("note: 3", "note must be str, got '3'"),
        ("kind: huge", "kind must be one of small, large, got 'huge'"),
        ("data: {classes: 3}", "data.classes must be list, got '3'"),
        ("data: {classes: [a]}", "data.classes must be int, got 'a'"),
        ("data: {fraction: 2}", "data.fraction must be in (0, 1], got 2.0"),
        ("data: {fraction: .nan}", "data.fraction must be in (0, 1], got nan"),
        ("seed: null", "seed must have a value, got none"),
        ("seed:", "seed must have a value, got none"),
        ("data: {classes: null}", "data.classes must have a value, got none"),
        ("data: null", "data must be a section of settings, got None"),
        ("data: 3", "data must be a section of settings, got 3"),
        ("data: [1]", "data must be a section of settings, got [1]"),
    ],
)
def test_a_file_with_a_wrong_setting_is_refused_in_these_words(
    written: Callable[..., Path], text: str, message: str
) -> None:
    assert refusal("--config", str(written(text))) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sead", "1"], "unknown key 'sead'; did you mean 'seed'?"),
        (["--data.fractoin=1"], "unknown key 'data.fractoin'; did you mean 'data.fraction'?"),
        (["--dta.fraction", "1"], "unknown key 'dta.fraction'; did you mean 'data'?"),
        (["--seed", "one"], "seed must be int, got 'one'"),
        (["--seed", "null"], "seed must be int, got 'None'"),
        (["--data.fraction", "0"], "data.fraction must be in (0, 1], got 0.0"),
        (["--seed"], "argument --seed: expected one argument"),
        (["extra"], "unrecognized arguments: extra"),
        (["--data", '{"x": 1}'], "Group 'data' does not accept option 'x'"),
    ],
)
def test_a_wrong_option_is_refused_in_these_words(argv: list[str], message: str) -> None:
    assert refusal(*argv) == message


def test_null_is_a_value_where_the_type_allows_none(written: Callable[..., Path]) -> None:
    assert parse(Config, ["--limit", "5", "--config", str(written("limit: null"))], prog="train").limit is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[1, 2]", "hello"])
def test_a_file_that_is_no_mapping_is_refused(written: Callable[..., Path], text: str) -> None:
    path = written(text)
    assert refusal("--config", str(path)).startswith(f"{path} must be a YAML mapping of sections to settings, got ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02\xff\xfe", "can't decode byte"),
        (b"seed: \x00", "special characters are not allowed"),
        (b"seed: [1", "expected ',' or ']'"),
        (b"? [1]\n: 2", "unhashable key"),
        (b"data: {fraction: 0.5}\ndata: {classes: [1]}", "'data' twice in one section"),
        (b"data: {fraction: 0.5, fraction: 0.6}", "'fraction' twice in one section"),
        (b"folder: 2024-13-45", "month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_by_name(written: Callable[..., Path], content: bytes, reason: str) -> None:
    path = written(content)
    message = refusal("--config", str(path))
    assert message.startswith(f"{path}: not a readable YAML file of plain data (")
    assert reason in message


def test_brackets_nested_too_deep_are_refused_in_one_line(written: Callable[..., Path]) -> None:
    path = written(b"[" * 5000)
    message = refusal("--config", str(path))
    assert message.startswith(f"{path}: not a readable YAML file of plain data (") and "\n" not in message


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    expected = f"{path}: not a readable YAML file of plain data (No such file or directory)"
    assert refusal("--config", str(path)) == expected
    with pytest.raises(ConfigError, match="No such file or directory"):
        load(Config, path)


def test_a_folder_in_place_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    expected = f"{tmp_path}: not a readable YAML file of plain data (Is a directory)"
    assert refusal(f"--config={tmp_path}") == expected


@pytest.mark.parametrize(
    "poison",
    [
        "!!python/object/apply:os.mkdir ['MARK']",
        "{seed: !!python/object/apply:os.system ['touch MARK']}",
        "{data: {fraction: !!python/object/new:os.mkdir ['MARK']}}",
    ],
)
@pytest.mark.parametrize("option", ["--config", "--data", "--cfg"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, written: Callable[..., Path], poison: str, option: str) -> None:
    mark = tmp_path / "executed"
    path = written(poison.replace("MARK", str(mark)))
    unsafe_load(path.read_text())
    assert mark.exists()  # the poison works where it is let
    mark.rmdir() if mark.is_dir() else mark.unlink()
    refusal(option, str(path))
    assert not mark.exists()


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
configs = st.builds(
    Config,
    seed=st.integers(),
    rate=st.floats(),
    bf16=st.booleans(),
    note=plain_text,
    limit=st.none() | st.integers(),
    kind=st.sampled_from(["small", "large"]),
    folder=st.from_regex(r"runs/[a-z0-9.:#-]{1,8}", fullmatch=True).map(Path),
    data=st.builds(Data, fraction=st.floats(0, 1, exclude_min=True), classes=st.lists(st.integers(-9, 9), max_size=3)),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_what_is_dumped_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config))
    assert repr(load(Config, path)) == repr(config)  # repr: NaN equals itself, 0 differs from 0.0 and from '0'


def test_the_dump_is_complete_plain_yaml_in_the_order_of_the_fields() -> None:
    assert dump(Config(data=Data(classes=[2, 0]))) == (
        "seed: 0\nrate: 0.1\nbf16: false\nnote: ''\nlimit: null\nkind: small\nfolder: runs\n"
        "data:\n  fraction: 1.0\n  classes:\n  - 2\n  - 0\n"
    )


def test_a_tuple_is_dumped_as_a_list() -> None:
    @dataclass
    class Pair:
        ends: tuple[int, int] = (1, 2)

    assert dump(Pair()) == "ends:\n- 1\n- 2\n"


def test_require_says_what_is_allowed_and_what_it_got() -> None:
    with pytest.raises(ConfigError, match=r"^train\.eps must be in \[0, 1\], got 1\.3$"):
        require(False, "train.eps", 1.3, "in [0, 1]")


def test_a_condition_that_holds_raises_nothing() -> None:
    assert require(True, "train.eps", math.nan, "in [0, 1]") is None  # type: ignore[func-returns-value]


class Stopped(UserError):
    status = 130


class Diverged(UserError):
    status = 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("seed must be int, got 'x'"), 2, "error: seed must be int, got 'x'\n"),
        (Diverged("loss is nan at step 3"), 1, "error: loss is nan at step 3\n"),
        (Stopped("stopped after step 3"), 130, "stopped after step 3\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device", "run/a.pt"), 1, "error: run/a.pt: No space left on device\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (OSError("disk on fire"), 1, "error: disk on fire\n"),
    ],
)
def test_an_error_ends_the_command_with_its_status_and_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as stop:
        command(main)
    assert stop.value.code == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("status", [None, 0, 3])
def test_a_command_that_returns_ends_with_what_it_returned(status: int | None) -> None:
    with pytest.raises(SystemExit) as stop:
        command(lambda: status)
    assert stop.value.code == status


def test_a_fault_of_the_program_itself_is_not_hidden() -> None:
    def main() -> int:
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        command(main)
