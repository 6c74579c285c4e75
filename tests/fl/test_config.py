"""Configuration files: what is read, and one sentence for each mistake."""

from pathlib import Path

import pytest

from fl import algorithms, config
from fl.config import tomllib
from fl.errors import ConfigError

QUICKSTART = Path(config.__file__).parent / "configs" / "quickstart.toml"


def parse(text: str) -> config.Config:
    return config.parse(tomllib.loads(text), "run.toml")


def test_a_configuration_is_read_whole(config_text: str) -> None:
    chosen = parse(config_text)
    assert chosen.experiment.names == ("quped",)
    assert chosen.equipment == [("mlp", 2, "tensor", 1.0)] * 3
    assert chosen.data.classes_per_client == (4, 5)
    assert chosen.algorithm("quped") == algorithms.QuPeD(distill=0.3)
    assert chosen.algorithm("local") == algorithms.Local()


def test_clients_may_be_one_table_or_groups(config_text: str) -> None:
    one = config_text.replace("[[clients]]", "[clients]")
    assert parse(one) == parse(config_text)
    more = parse(config_text + '\n[[clients]]\ncount = 1\narchitecture = "cnn"\nbits = "ternary"\ngroups = "channel"\n')
    assert more.equipment == [("mlp", 2, "tensor", 1.0)] * 3 + [("cnn", "ternary", "channel", 1.0)]


def test_the_command_line_overrides_and_an_algorithm_given_there_runs_alone(config_text: str) -> None:
    text = config_text.replace("rounds = 2", 'rounds = 2\ncompare = ["local", "fedavg"]')
    assert parse(text).experiment.names == ("quped", "local", "fedavg")
    assert parse(text).override(rounds=7, seed=5).experiment.names == ("quped", "local", "fedavg")
    changed = parse(text).override(algorithm="fedavg", rounds=7, seed=5).experiment
    assert (changed.names, changed.rounds, changed.seed) == (("fedavg",), 7, 5)


def test_the_quickstart_is_what_it_promises() -> None:
    chosen = config.load(QUICKSTART)
    architectures, bits, _, _ = zip(*chosen.equipment, strict=True)
    assert len(chosen.equipment) >= 10
    assert set(bits) == {1, 2, 4}
    assert set(architectures) == {"mlp", "cnn"}
    assert chosen.data == config.Data(name="digits", classes_per_client=(3, 4), fractions=(0.6, 0.1, 0.3))
    assert set(chosen.experiment.names) == {"quped", "fedavg", "local"}


MISTAKES = [
    ("rounds = 2", "rouns = 2", r"\[experiment\]: unknown key 'rouns', allowed are name, rounds, sample"),
    ("rounds = 2", "", r"\[experiment\]: needs the key 'rounds'"),
    ("rounds = 2", 'rounds = "2"', "rounds must be an integer, got '2'"),
    ("rounds = 2", "rounds = true", "rounds must be an integer, got True"),
    ("rounds = 2", "rounds = 2.0", "rounds must be an integer, got 2.0"),
    ("rounds = 2", "rounds = 2\nseed = -1", "seed must be between 0"),
    (
        "rounds = 2",
        'rounds = 2\ncompare = ["fedsgd"]',
        "compare must be one of ditto, fedavg, .*, quped, qupel, got 'fedsgd'",
    ),
    ("rounds = 2", 'rounds = 2\ncompare = ["quped"]', "compare must name each algorithm once"),
    ("rounds = 2", 'rounds = 2\ncompare = "local"', "compare must be a list of strings, got 'local'"),
    (
        "rounds = 2",
        'rounds = 2\narchitecture = "vgg"',
        "architecture must be one of cnn, cnn1, cnn2, mlp, resnet20, resnet32, resnet8, got 'vgg'",
    ),
    ('name = "tiny"', 'name = "../tiny"', "name must be a plain file name"),
    ("classes_per_client = [4, 5]", "classes_per_client = [4, 5, 6]", "must be an integer or a list of 2 integers"),
    ("bits = 2", "bits = 9", "bits must be one of 1, 2, 3, .*, got 9"),
    ("bits = 2", 'bits = 2\ngroups = "row"', "groups must be 'tensor', 'channel' or a block length, got 'row'"),
    (
        'name = "digits"',
        'name = "digits"\npartition = "random"',
        "partition must be one of classes, dirichlet, shards,",
    ),
    ('name = "digits"', 'name = "digits"\naugment = "crop"', "augment must be one of none, flip_crop, got 'crop'"),
    ('name = "digits"', 'name = "digits"\nsamples = 0', "samples must be at least 1, got 0"),
    ("bits = 2", 'bits = "two"', "bits must be one of .*ternary, float, got 'two'"),
    ("count = 3", "count = 0", "count must be at least 1, got 0"),
    ("[[clients]]", "[[client]]", "unknown key 'client', allowed are experiment, data, clients, wire, algorithms"),
    ("distill = 0.3", "distil = 0.3", r"\[algorithms.quped\]: unknown key 'distil', allowed are local_steps"),
    ("distill = 0.3", "distill = 1.3", "distill must be between 0 and 1, got 1.3"),
    ("distill = 0.3", 'variant = "soft"', "variant must be one of simultaneous, alternating, hard, got 'soft'"),
    ("distill = 0.3", "rate = 0", "rate must be positive and finite, got 0.0"),
    ("[algorithms.quped]", "[algorithms.quper]", "unknown key 'quper', allowed are ditto, fedavg, .*, qupel"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), MISTAKES, ids=[new for _, new, _ in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_the_key(config_text: str, old: str, new: str, sentence: str) -> None:
    assert old in config_text
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(config_text.replace(old, new, 1))
    assert str(caught.value).startswith("config: run.toml")
    assert "\n" not in str(caught.value)


def test_no_clients_and_no_tables_are_refused(config_text: str) -> None:
    without = config_text[: config_text.index("[[clients]]")]
    with pytest.raises(ConfigError, match="clients must have at least one group"):
        parse("clients = []\n" + without)
    without_data = config_text.replace("[data]\n", "").replace('name = "digits"\n', "")
    with pytest.raises(ConfigError, match=r"\[data\]: must be a table, got 3"):
        parse("data = 3\n" + without_data.replace("classes_per_client = [4, 5]\n", ""))


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[experiment\n")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'name = "\xe9"')
    for path, sentence in [
        (tmp_path / "absent.toml", "there is no file"),
        (broken, "must be a readable TOML file"),
        (latin, "must be a readable TOML file"),
        (tmp_path, "must be a readable TOML file"),
    ]:
        with pytest.raises(ConfigError, match=sentence) as caught:
            config.load(path)
        assert "\n" not in str(caught.value)
