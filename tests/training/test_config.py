"""Merging YAMLs, overrides and flags, and the checks before anything is built."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ldm.training import config
from ldm.training.command_line import TRAINER_OPTIONS, parse
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
    config.check_run_config(merged, TRAINER_OPTIONS)


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
    callbacks = config.complete_lightning(merged.lightning, personalization=True)["callbacks"]
    assert not callbacks.keys() & config.OLD_CALLBACK_NAMES.keys()
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
def test_unknown_keys(tmp_path, base, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(load(tmp_path, override, base))
    assert "\n" not in str(caught.value)


def test_all_problems_in_one_error(tmp_path, base):
    with pytest.raises(ConfigError) as caught:
        check(load(tmp_path, "model.params.a=1 data.b=1 lightning.trainer.c=1", base, {"d": 1}))
    for key in "abcd":
        assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize("word", ["a\u202eb", "c\u200bat", "embedding:cat", " "])
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
    with pytest.raises(ConfigError, match="give --data_root FOLDER"):
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
