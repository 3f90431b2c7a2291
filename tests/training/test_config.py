"""Merging YAMLs, overrides and flags, and the checks before anything is built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.base_models import CONFIGS
from ldm.front_ends import speaking_as
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.training import command_line, config
from ldm.training.callbacks import OLD_CALLBACK_NAMES, complete_lightning
from ldm.training.command_line import parse
from ldm.training.data import DataModuleFromConfig
from ldm.util import ConfigError, UsageError, UserError
from ldm.yaml_files import read_yaml

PERSONALIZED = "ldm.data.personalized.PersonalizedBase"


STYLE = "ldm.data.personalized_style.PersonalizedBase"


MANAGER = "model.params.personalization_config.params"


def load(tmp_path, words="", *yamls):
    paths = []
    for number, text in enumerate(yamls):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text if isinstance(text, str) else OmegaConf.to_yaml(OmegaConf.create(text)))
    return config.load_run_config(parse(words.split()), paths)


def check(merged):
    config.check_run_config(merged)


@pytest.fixture
def base(tiny_yaml):
    return tiny_yaml.read_text()


def at(merged, key):
    return OmegaConf.select(merged, key)


def test_later_yamls_and_overrides_win(tmp_path, base):
    other = {"model": {"base_learning_rate": 1.0, "params": {"channels": 3}}}
    merged = load(tmp_path, "model.params.channels=5", base, other)
    assert merged.model.base_learning_rate == 1.0
    assert merged.model.params.channels == 5
    assert merged.model.params.image_size == 8


def test_override_of_one_list_entry(tmp_path, base):
    words = (
        "model.params.unet_config.params.channel_mult=[1,2] model.params.unet_config.params.channel_mult[1]=4"
    )
    assert at(load(tmp_path, words, base), "model.params.unet_config.params.channel_mult") == [1, 4]


def test_flags_set_their_keys(tmp_path, base):
    words = (
        "--data_root pics --placeholder_string <cat> --init_word kitten --actual_resume m.ckpt --max_steps 7 "
        "--embedding_manager_ckpt e.pt --gpus 0, --num_vectors 3 --resolution 16"
    )
    merged = load(tmp_path, words, base)
    assert at(merged, f"{MANAGER}.placeholder_strings") == ["<cat>"]
    assert at(merged, f"{MANAGER}.initializer_words") == ["kitten"]
    assert at(merged, f"{MANAGER}.embedding_manager_ckpt") == "e.pt"
    assert at(merged, f"{MANAGER}.num_vectors_per_token") == 3
    for split in ("train", "validation"):
        params = merged.data.params[split].params
        assert (params.data_root, params.placeholder_token, params.size) == ("pics", "<cat>", 16)
    assert merged.actual_resume == "m.ckpt"
    assert (merged.lightning.trainer.max_steps, merged.lightning.trainer.gpus) == (7, "0,")


def test_override_of_a_datasets_data_root(tmp_path, base):
    merged = load(tmp_path, "data.params.train.params.data_root=others", base)
    again = load(tmp_path, "", OmegaConf.to_yaml(merged))  # as a resumed run reads it
    for found in (merged, again):
        assert found.data.params.train.params.data_root == "others"
        assert found.data.params.validation.params.data_root == found.data_root != "others"
    for words, *yamls in (("--data_root third", merged), ("", merged, {"data_root": "third"})):
        found = load(tmp_path, words, *yamls)
        assert {found.data.params[split].params.data_root for split in ("train", "validation")} == {"third"}


def test_init_word_keeps_further_words(tmp_path, base):
    more = {"model": {"params": {"personalization_config": {"params": {"initializer_words": ["a", "b"]}}}}}
    merged = load(tmp_path, "--init_word kitten", base, more)
    assert at(merged, f"{MANAGER}.initializer_words") == ["kitten", "b"]


def test_dataset_gets_the_placeholder_of_the_personalization(tmp_path, base):
    other = {"model": {"params": {"personalization_config": {"params": {"placeholder_strings": ["<dog>"]}}}}}
    merged = load(tmp_path, "", base, other)
    assert merged.data.params.train.params.placeholder_token == "<dog>"


def test_precedence_of_the_datasets_placeholder(tmp_path, base):
    own = {"data": {"params": {"train": {"params": {"placeholder_token": "@"}}}}}
    assert load(tmp_path, "", base, own).data.params.train.params.placeholder_token == "@"
    merged = load(tmp_path, "--placeholder_string <cat>", base, own)
    assert merged.data.params.train.params.placeholder_token == "<cat>"


def test_other_target_drops_unaccepted_params(tmp_path, base):
    other = {
        "model": {"params": {"personalization_config": {"target": "torch.nn.Linear", "params": {"bias": 1}}}}
    }
    merged = load(tmp_path, "", base, other)
    assert "num_vectors_per_token" not in at(merged, MANAGER)
    assert at(merged, f"{MANAGER}.bias") == 1


def test_old_names_of_callbacks(tmp_path, base):
    old = {"lightning": {"callbacks": {"tripwires": {"params": {"rollbacks": 1}}, "summary_pictures": None}}}
    words = "lightning.callbacks.health.params.every_n_train_steps=2 "
    words += "lightning.callbacks.training_guard.params.every_n_train_steps=3"
    merged = load(tmp_path, words, base, old)
    check(merged)
    callbacks = complete_lightning(merged.lightning, personalization=True)["callbacks"]
    assert not callbacks.keys() & OLD_CALLBACK_NAMES.keys()
    assert callbacks.training_guard.params == {"rollbacks": 1, "every_n_train_steps": 3}
    assert callbacks.training_guard.target.endswith("guard.TrainingGuard")
    assert callbacks.vector_stats.params == {"every_n_train_steps": 2}
    assert callbacks.summary_images is None
    with pytest.raises(ConfigError, match="TrainingGuard.*'every'"):
        check(load(tmp_path, "lightning.callbacks.tripwires.params.every=2", base))


def test_other_dataset_keeps_shared_params(tmp_path, base):
    merged = load(tmp_path, f"data.params.train.target={STYLE}", base)
    assert merged.data.params.train.params.size == 32
    check(merged)


def test_learning_rate_flag_is_not_scaled(tmp_path, base):
    assert load(tmp_path, "--learning_rate 1e-4", base).scale_lr is False
    assert load(tmp_path, "--learning_rate 1e-4 --scale_lr", base).scale_lr is True
    assert "scale_lr" not in load(tmp_path, "", base)


def test_flags_create_no_validation_set(tmp_path, base):
    merged = load(tmp_path, "--resolution 16", base)
    del merged.data.params["validation"]
    assert "validation" not in load(tmp_path, "--resolution 16", OmegaConf.to_yaml(merged)).data.params


def test_valid_yaml(tmp_path, base):
    check(load(tmp_path, "", base))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.params.chanels=4", "LatentDiffusion.*'chanels'"),
        ("model.params.unet_config.params.layers=4", "UNetModel.*'layers'"),
        ("model.params.personalization_config.params.vectors=4", "EmbeddingManager.*'vectors'"),
        ("model.params.first_stage_config.target=ldm.models.nothing.X", "no module 'ldm.models.nothing'"),
        ("model.lr=4", "model: unknown key 'lr'"),
        ("data.params.train.params.sise=4", "PersonalizedBase.*'sise'"),
        ("data.params.batchsize=4", "DataModuleFromConfig.*'batchsize'"),
        ("data.batch_size=4", "data: unknown key 'batch_size'"),
        ("lightning.trainer.max_step=4", "lightning.trainer: unknown key 'max_step'"),
        ("lightning.trainers.max_steps=4", "lightning: unknown key 'trainers'"),
        ("lightning.callbacks.image_logger.params.frequency=4", "ImageLogger.*'frequency'"),
        ("lightning.callbacks.embedding_saver.params.every=4", "EmbeddingSaver.*'every'"),
        ("lightning.callbacks.mine.params.x=4", "'mine' has no target"),
    ],
)
@pytest.mark.refused_first
def test_unknown_keys(tmp_path, base, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(load(tmp_path, override, base))
    assert "\n" not in str(caught.value)


@pytest.mark.refused_first
def test_all_problems_in_one_error(tmp_path, base):
    with pytest.raises(ConfigError) as caught:
        check(load(tmp_path, "model.params.a=1 data.b=1 lightning.trainer.c=1", base, {"d": 1}))
    for key in "abcd":
        assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize("word", ["a\u202eb", "c\u200bat", "embedding:cat", " "])
@pytest.mark.refused_first
def test_a_word_that_cannot_be_kept_is_refused_before_anything_is_built(tmp_path, base, word):
    other = {
        "model": {"params": {"personalization_config": {"params": {"placeholder_strings": ["*", word]}}}}
    }
    with pytest.raises(UserError, match="^placeholder '"):
        check(load(tmp_path, "", base, other))


def test_missing_parts(tmp_path, base):
    with pytest.raises(ConfigError, match="there is no model"):
        check(load(tmp_path))
    with pytest.raises(ConfigError, match="there is no data node"):
        check(load(tmp_path, "", {"model": {"target": "torch.nn.Identity"}}))
    with pytest.raises(ConfigError, match="there is no value for model.params.ema_decay"):
        check(load(tmp_path, "", base, {"model": {"params": {"ema_decay": "???"}}}))
    rootless = OmegaConf.create(base)
    del rootless["data_root"]
    with pytest.raises(
        ConfigError, match="there is no image folder; give it with images=, or as data_root in the YAML"
    ):
        check(load(tmp_path, "", rootless))


def test_init_word_without_personalization(tmp_path, base):
    plain = OmegaConf.create(base)
    del plain.model.params["personalization_config"]
    with pytest.raises(UsageError, match="--init_word needs a YAML"):
        load(tmp_path, "--init_word cat", plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", r"line 1, column 4 is not a valid YAML"), ("- a\n- b\n", "must hold a mapping")],
)
@pytest.mark.refused_first
def test_invalid_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "", text)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such YAML"):
        read_yaml(tmp_path / "no.yaml")


MANAGER_CLASS = "ldm.modules.embedding_manager.EmbeddingManager"


def seeded(target: str = MANAGER_CLASS, **params):
    node = {"target": target, "params": params}
    return OmegaConf.create({"seed": 7, "model": {"params": {"personalization_config": node}}})


def test_seed_of_the_run_is_the_default_seed_of_the_vectors() -> None:
    for given, expected in (({}, 7), ({"seed": 3}, 3)):
        run = seeded(**given)
        config.seed_vectors(run)
        assert run.model.params.personalization_config.params.seed == expected
    other = seeded("ldm.modules.encoders.modules.ClassEmbedder")
    config.seed_vectors(other)
    assert "seed" not in other.model.params.personalization_config.params
    config.seed_vectors(OmegaConf.create({"seed": 7, "model": {"params": {}}}))


def refused(tmp_path, words, *yamls, kind=ConfigError):
    """The message about a command line over YAMLs, which lie in 0.yaml, 1.yaml, ..."""
    with speaking_as("command"), pytest.raises(kind) as caught:
        merged = load(tmp_path, words, *yamls)
        paths = [tmp_path / f"{number}.yaml" for number in range(len(yamls))]
        options = parse(words.split())
        config.check_run_config(merged, command_line.places(options, paths))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


NUMBERS = [-1, 0, 1.5, math.nan, math.inf, "x", None, [], {}, 10**12]
WRONG = {  # key -> the values that it may have
    "model.base_learning_rate": [1.5, None],
    "model.params.timesteps": [],
    "model.params.image_size": [],
    "model.params.linear_start": [],
    "model.params.unet_config.params.model_channels": [],
    "model.params.first_stage_config.params.ddconfig.ch": [],
    f"{MANAGER}.progressive_scale": [10**12],
    f"{MANAGER}.num_vectors_per_token": [{}],
    "data.params.batch_size": [],
    "data.params.num_workers": [0, None],
    "data.params.train.params.flip_p": [0],
    "data.params.train.params.size": [None],
    "lightning.callbacks.image_logger.params.batch_frequency": [0, 10**12],
    "lightning.callbacks.deterministic_loss.params.stop.window": [10**12],
    "lightning.trainer.max_steps": [-1, None, 10**12],
    "lightning.trainer.precision": [None],
    "seed": [0],
    "scale_lr": [],
}


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.refused_first
def test_values_out_of_range_are_named_with_their_line(tmp_path, base, key):
    overlay = OmegaConf.create({})
    for value in NUMBERS:
        if value in WRONG[key] and type(value) in map(type, WRONG[key]):
            continue
        OmegaConf.update(overlay, key, value, merge=False, force_add=True)
        text = OmegaConf.to_yaml(overlay)
        message = refused(tmp_path, "", base, text)
        line = text.count("\n") - (value in ([], {}) and 0)
        assert message.startswith(key) and f"(1.yaml, line {line})" in message, message


def test_places(tmp_path, base):
    key = "model.params.timesteps"
    assert refused(tmp_path, f"{key}=0", base) == f"{key} is 0; it must be a whole number from 2 to 10,000"
    flag = refused(tmp_path, "--max_steps 0", base, kind=UsageError)
    assert flag.startswith("lightning.trainer.max_steps is 0 (--max_steps); it must be")
    flag = refused(tmp_path, "--train_batch_size 1000000000000", base, kind=UsageError)
    assert flag.startswith("data.params.batch_size is 1000000000000 (--train_batch_size)")
    assert refused(tmp_path, "--seed -1", base, kind=UsageError).startswith("seed is -1 (--seed)")
    misspelt = {"model": {"params": {"timstep": 5}}}
    message = refused(tmp_path, "", base, misspelt)
    assert "unknown key 'timstep' (1.yaml, line 3) (did you mean 'timesteps'?)" in message


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("model: 5\n", "model is 5 (1.yaml, line 1) where a mapping is needed"),
        ("model:\n  params: [1]\n", "model.params is a list (1.yaml, line 2) where"),
        ("model:\n  params:\n    unet_config: x\n", "model.params.unet_config is 'x' (1.yaml, line 3)"),
        ("lightning:\n  callbacks:\n    progress: 5\n", "lightning.callbacks.progress is 5 (1.yaml, line 3)"),
        ("lightning:\n  trainer:\n  - max_steps: 5\n", "lightning.trainer is a list (1.yaml, line 2)"),
        (
            "init_word: no\n",
            "init_word is false (1.yaml, line 1); it must be a text or null; write it in quotes",
        ),
        ("placeholder_string: 5\n", "placeholder_string is 5 (1.yaml, line 1)"),
        (
            "model:\n  params:\n    timesteps: ${steps}\n",
            "is '${steps}' (1.yaml, line 3), but there is no key",
        ),
        ("data:\n  params:\n    train: null\n", "there is no data.params.train (1.yaml, line 3)"),
        (
            "data:\n  params:\n    train:\n      params:\n        size: 30\n",
            "data.params.train.params.size is 30 (1.yaml, line 5); this model needs a multiple of 8; try 32",
        ),
    ],
)
@pytest.mark.refused_first
def test_wrong_shapes_of_a_yaml(tmp_path, base, overlay, message):
    assert message in refused(tmp_path, "", base, overlay)


def test_rates_by_steps(tmp_path, base):
    for rates in ("0.005:100, nan:1000", "0.005:100, -1e-3:1000", "0.005:100, 1e-3:50, 1e-4", "fast"):
        message = refused(tmp_path, "", base, {"model": {"base_learning_rate": rates}})
        assert message.startswith("model.base_learning_rate (1.yaml, line 2): learning rate '")
    check(load(tmp_path, "model.base_learning_rate=0.005:100,1e-3:1000", base))


def test_parts_that_are_switched_off(tmp_path, base):
    check(
        load(tmp_path, "", base, "lightning:\n  modelcheckpoint: null\n  logger: null\n  callbacks: null\n")
    )


def test_single_text_as_placeholder(tmp_path, base):
    single = {"placeholder_strings": "<cat>"}
    other = {"model": {"params": {"personalization_config": {"params": single}}}}
    merged = load(tmp_path, "", base, other)
    check(merged)
    assert merged.data.params.train.params.placeholder_token == "<cat>"


@pytest.mark.one_reader
def test_a_yaml_of_stabilitys_generative_models_is_named(tmp_path):
    path = tmp_path / "sd_xl_base.yaml"
    path.write_text("model: {target: sgm.models.diffusion.DiffusionEngine}")
    with pytest.raises(
        ConfigError, match=r"sd_xl_base.yaml' is a YAML of Stability's generative-models.*leave it out"
    ):
        config.check_command_line(parse(["--base", str(path), "-t"]))


class Pool(EmbeddingManager):
    """A personalization of one's own: its vectors share a position, and it has words that no YAML names."""


class Renaming(DataModuleFromConfig):
    """Data of one's own: its samples may have any keys."""


class SparseAdam(torch.optim.Adam):
    """Not the one of torch."""


@pytest.mark.parametrize(
    "words",
    [
        "model.params.cond_stage_config=__is_unconditional__ model.params.personalization_config=null",
        "model.params.cond_stage_config=__is_first_stage__ model.params.personalization_config=null",
        f"model.params.personalization_config.target={__name__}.Pool {MANAGER}.num_vectors_per_token=64",
        f"model.params.personalization_config.target={__name__}.Pool data.params.train.params.placeholder_token=@",
        f"data.target={__name__}.Renaming model.params.first_stage_key=jpg data.params.num_workers=1000",
        f"model.params.optimizer_config.target={__name__}.SparseAdam",
        # A logger that Lightning no longer has is left out.
        "lightning.logger.target=pytorch_lightning.loggers.TestTubeLogger",
        "lightning.logger.target=test_tube.TestTubeLogger",
        "lightning.trainer.resume_from_checkpoint=last.ckpt data.params.train.params.mask_weight=0.1 "
        "data.params.train.params.center_crop=false",
    ],
)
def test_what_is_no_mistake_is_not_refused(words: str, tiny_yaml: Path, tmp_path: Path) -> None:
    """Classes of one's own may do as they like, and what is not known yet is left to the run."""
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 8, 32))
    mask.save(tmp_path / "a-masklabel.png")
    line = f"--base {tiny_yaml} -t --data_root {tmp_path} {words}"
    config.check_command_line(parse(line.split()))


def test_words_are_equal_in_their_composed_form(base: str, tmp_path: Path) -> None:
    """The same letter, decomposed in one place and with a space that does not break in another."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    own = {"placeholder_strings": ["e\u0301", "my\u00a0cat"], "initializer_words": ["bear", "cat"]}
    train = {
        "data_root": {"e\u0301": str(tmp_path), "my\u00a0cat": str(tmp_path)},
        "coarse_class_text": {"\u00e9": "bear", "my cat": "cat"},
    }
    nodes = {
        "model": {"params": {"personalization_config": {"params": own}}},
        "data": {"params": {"train": {"params": train}}},
    }
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "own.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(nodes)))
    config.check_command_line(parse(f"--base {tmp_path}/base.yaml {tmp_path}/own.yaml -t".split()))


def test_models_of_the_hub_are_asked_for_before_their_words(tmp_path: Path) -> None:
    """Their YAML is not known at once, nor are the words of the run."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    own = tmp_path / "own.yaml"
    train = {"target": PERSONALIZED, "params": {"coarse_class_text": {"<cat>": "cat"}}}
    own.write_text(OmegaConf.to_yaml({"data": {"params": {"train": train}}}))
    model = "--pretrained_model_name_or_path some/model --placeholder_string <cat>"
    config.check_command_line(parse(f"--base {own} {model} -t --data_root {tmp_path}".split()))


def test_core_without_weight_is_one_vector_on_stable_diffusion_xl(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    yamls = f"{CONFIGS}/stable-diffusion/xl-finetune.yaml {CONFIGS}/personalization/core.yaml"
    line = f"--base {yamls} -t --data_root {tmp_path}"
    config.check_command_line(parse(f"{line} {MANAGER}.context_weight=0".split()))
    with pytest.raises(ConfigError, match="CoRe learns more than vectors"):
        config.check_command_line(parse(line.split()))
