"""Where settings come from: flags, a YAML file, a preset, the run that is resumed."""

import pytest

from attnres.run.folder import read_config


@pytest.fixture
def configured(monkeypatch):
    """configured(*argv) -> the run that `attnres train` would start."""
    from attnres.commands import train as command

    class Started(Exception):
        pass

    def start(config, resume):
        raise Started(config)

    monkeypatch.setattr(command, "train", start)

    def configured(*argv):
        with pytest.raises(Started) as started:
            command.run([str(a) for a in argv])
        return started.value.args[0]

    return configured


def test_flags_win_over_the_file(configured, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("""
        steps: 7
        batch_size: 3
        out: elsewhere
        compile: true
        cache-dir: null
        optim: {lr: 1e-2, betas: [0.8, 0.9], warmup-steps: 0, muon_lr: 0.5, optimizer: muon}
        model: {hidden_size: 64, tie_word_embeddings: false}
        residual: {name: full_attnres, stream_scale: false, eps: 1.0e-5}
    """)
    config = configured("--config", file, "--batch-size", 5, "--optim.lr", 0.25, "--model.tie-word-embeddings")
    assert (config.steps, config.batch_size, str(config.out), config.compile) == (7, 5, "elsewhere", True)
    assert (config.optim.lr, config.optim.betas, config.optim.muon_lr) == (0.25, (0.8, 0.9), 0.5)
    assert (config.model.hidden_size, config.model.tie_word_embeddings, config.cache_dir) == (64, True, None)
    assert config.model.residual == "full_attnres"
    assert config.model.residual_options == {"stream_scale": False, "eps": 1e-5}


def test_sizes_that_follow_from_others_follow(configured, tmp_path):
    model = configured("--model.hidden-size", 96, "--model.num-attention-heads", 6).model
    assert (model.head_dim, model.num_key_value_heads, model.intermediate_size) == (16, 6, 256)
    model = configured("--preset", "small", "--model.hidden-size", 256).model
    assert (model.head_dim, model.num_attention_heads, model.num_key_value_heads) == (32, 8, 4)
    file = tmp_path / "settings.yaml"
    file.write_text("preset: small\nmodel: {head_dim: 64}")
    model = configured("--config", file, "--model.hidden-size", 256).model
    assert (model.head_dim, model.num_hidden_layers, model.intermediate_size) == (64, 12, 704)


def test_options_of_the_residual_reach_the_model(configured):
    config = configured("--residual.block-size", 6, "--residual.schedule", "two_phase")
    built = config.model.build_residual()
    assert (built.block_starts, built.schedule, built.stream_scale) == ((0, 6, 12, 18), "two_phase", True)


def test_resuming_takes_the_saved_settings(configured, finished_run, tiny, tmp_path):
    saved = read_config(finished_run)
    assert configured("--resume", "--out", finished_run) == saved
    assert saved.model.vocab_size == 270
    file = tmp_path / "settings.yaml"
    file.write_text(f"resume: true\nout: {finished_run}\nmodel: {{num_hidden_layers: 2}}\nkeep: 9")
    config = configured("--config", file, "--log-every", 2)
    assert (config.model, config.keep, config.log_every) == (saved.model, 9, 2)


def test_resuming_a_shape_whose_heads_do_not_fill_the_width(configured, server, tiny, tmp_path):
    shape = ["--model.hidden-size", 30, "--model.num-attention-heads", 4, "--model.head-dim", 8, "--steps", 3]
    assert server.run("train", *tiny, *shape, "--out", tmp_path / "run").status == 0
    assert configured("--resume", "--out", tmp_path / "run") == read_config(tmp_path / "run")


def test_peeking_does_not_mistake_values_for_flags(configured):
    assert configured("--data=--preset", "--preset=tiny").data == "--preset"


def test_paths_may_begin_with_the_home_folder(configured, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("out: ~/run\ncache_dir: ~/cache")
    config = configured("--config=~/settings.yaml")
    assert (config.out, config.cache_dir) == (tmp_path / "run", tmp_path / "cache")
    (tmp_path / "link").symlink_to(finished_run)
    assert configured("--resume", "--out=~/link").out == tmp_path / "link"


def test_so_may_those_of_other_commands(tmp_path, monkeypatch):
    from attnres.commands import convert, flags, generate, inspect

    monkeypatch.setenv("HOME", str(tmp_path))
    for flag_class, argv in (
        (generate.GenerateFlags, ["~/a"]),
        (convert.ConvertFlags, ["~/a", "~/b"]),
        (inspect.InspectFlags, ["~/a", "--data=~/b", "--out=~/c"]),
    ):
        given = flags.parse("", argv, flag_class).make(flag_class)
        assert str(tmp_path / "a") in map(str, vars(given).values()) and "~" not in str(given)
