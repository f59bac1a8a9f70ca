"""What is a secret by its name, by its shape or by looking random, and what is none."""

from __future__ import annotations

import pytest

from spin_lightning.runs.redaction import redacted

RANDOM = "q7Rt2Lm9Xc4Vb8Nz1Ks6Wd3P"  # as keys are: 24 letters and digits


@pytest.mark.parametrize(
    "name",
    "api_key apiKey APIKEY x-api-key openai_api_key api_key_2 secret clientSecret aws_secret_access_key password "
    "db_password PASSWD passphrase pass pwd db_pwd token hf_token HF_TOKEN pushToken auth AUTH authToken auth_header "
    "oauth bearer authorization jwt cookie session_id credentials private_key ssh_key account_key dsn webhook_url "
    "connection_string sas sig "
    "init_args.api_key --api-key".split(),
)
def test_a_secret_by_name_is_left_out_whatever_it_is(name: str) -> None:
    for value in ("x", "two words", 7, ["x"]):
        assert redacted({name: value})[name] in ("***", ["***"])


@pytest.mark.parametrize(
    "name",
    ["wandb_key", "hub_key", "license_key", "key", "keys", "tokens", "hub_tokens", "token1", "token_id", "tokenvalue"],
)
def test_a_name_that_may_be_one_hides_only_what_looks_like_a_key(name: str) -> None:
    assert redacted({name: "a1b2c3d4e5f6a7b8"}) == {name: "***"}
    assert redacted({name: "column_12"}) == {name: "column_12"} and redacted({name: 12}) == {name: 12}


@pytest.mark.parametrize(
    "name",
    "max_new_tokens pad_token eos_token eos_token_id num_tokens micro_batch_tokens keep_prompts_together "
    "tokenizer_name_or_path author "
    "key_heads num_key_value_heads image_token sort_key bypass passes design signal pin_memory compass monkey".split(),
)
def test_names_that_only_sound_like_it_are_kept(name: str) -> None:
    for value in ("x", "<|end|>", "Qwen/Qwen2.5-0.5B-Instruct", 3):
        assert redacted({name: value}) == {name: value}


SHAPES = {
    "hub": "hf_{}", "openai": "sk-proj-{}", "anthropic": "sk-ant-api03-{}", "github": "ghs_{}",
    "github fine": "github_pat_{}",
    "gitlab": "glpat-{}", "slack": "xoxp-{}", "google": "AIza{}abcdefghijk", "google oauth": "ya29.{}", "npm": "npm_{}",
    "replicate": "r8_{}", "stripe": "sk_live_{}", "unknown": "{}", "unknown with words": "key={}, please",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{}",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
    "userinfo": "https://me:{}@host/x", "userinfo alone": "https://{}@host/x", "query": "https://h/x?page=1&access_token={}",
    "signature": "https://h/x?sv=1&sig={}", "path": "https://hooks.example.com/services/T0/B0/{}", "basic": "Basic {}",
    "bearer": "bearer {}", "flag": "--api-key={}", "flag apart": "--api-key {}", "mangled": "s3:/me:{}@host/x",
    "groq": "gsk_{}",
    "header": "Cookie: {}", "json": '{{"password": "{}"}}', "quoted": "Made(password='{}')",
    "connection": "Server=db;User=me;Password={}",
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_secret_by_shape_is_left_out_wherever_it_stands(shape: str) -> None:
    value = shape.format(RANDOM)
    for kept in (redacted({"setting": value}), redacted([[value]]), redacted({"init_args": {value: 1}})):
        assert RANDOM not in str(kept) and "***" in str(kept)


@pytest.mark.parametrize(
    "value", ["dapi" + "0123456789abcdef" * 2, "AKIAABCD1234EFGH5678", "ASIAABCD1234EFGH5678", "0123456789" * 4]
)
def test_keys_without_capitals_and_small_letters_side_by_side(value: str) -> None:
    assert redacted({"setting": value}) == {"setting": "***"}


def test_short_secrets_in_urls_and_pairs_are_left_out() -> None:
    assert redacted("https://h/x?page=1&token=pw&n=2#top") == "https://h/x?page=1&token=***&n=2#top"
    assert redacted("postgres://me:pw@db/x") == "postgres://***@db/x"
    assert redacted([{"name": "API_KEY", "value": "pw"}, {"name": "n", "value": "2"}]) == [
        {"name": "API_KEY", "value": "***"},
        {"name": "n", "value": "2"},
    ]


@pytest.mark.parametrize(
    "value",
    [
        "ac6e600eefcce74f5e8bae1035d4f66019e93190/model",
        "/home/ada/.cache/huggingface/hub/models--a--b/snapshots/ac6e600eefcce74f5e8bae1035d4f66019e93190",
        "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "org/DeepSeekR1DistillQwen15B",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "### Instruction: {prompt}\n\n### Response: ",
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "basic instructions for the bearer",
        "Bearer of bad news",
        "the password: is asked for in row 3, the token: a word",
        "hf_dataset_train_and_held_out",
        "sk-learn-pipeline-experiments",
        "runs/2026-11-26_lr1e-5_beta1.0_seed42_HuggingFaceTB-SmolLM2-135M",
        "train-00000-of-00042-ab12cd34ef56ab78.parquet",
        "https://host:8080/x?mail=a@b",
    ],
)
def test_hashes_paths_names_and_templates_are_kept(value: str) -> None:
    assert redacted({"setting": value}) == {"setting": value}


@pytest.mark.parametrize("name", ["self_play.output_dir", "data.train_data", "model.model_name_or_path", "run"])
@pytest.mark.parametrize(
    "value", ["550e8400e29b41d4a716446655440000", "lr1e5Bs8Ep3Wd01Beta01Seed42", "runs/lr1e5Bs8Ep3Wd01Beta01"]
)
def test_a_place_may_be_named_as_keys_look(name: str, value: str) -> None:
    assert redacted({name: value}) == {name: value}
    assert redacted({name: f"https://me:pw@host/{RANDOM}"}) == {name: "https://***@host/***"}
    assert redacted({name: f"hf_{RANDOM}"}) == {name: "***"}


def test_short_secrets_by_name_inside_of_texts() -> None:
    for text, kept in (
        ("api_key: pw", "api_key: ***"),
        ('{"password": "pw", "n": "2"}', '{"password": "***", "n": "2"}'),
        ("C(password='pw', n=2)", "C(password='***', n=2)"),
        ("https://me:p@w@host/x", "https://***@host/x"),
        ("hooks.slack.com/services/T0/B0/x", "hooks.slack.com/***"),
    ):
        assert redacted(text) == kept


def test_revisions_are_kept_by_their_name() -> None:
    revision = "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    kept = {"model.revision": revision, "data.data_revision": revision, "commit": revision, "prompts_sha256": revision}
    assert redacted(kept) == kept and redacted({"setting": revision}) == {"setting": "***"}


def test_the_value_of_a_flag_in_a_list_is_left_out_by_the_name_of_the_flag() -> None:
    args = ["--api-key", "mine", "--max-model-len", 2048, "--hf_token", "hf_abcdefghijklmnop", "--enforce-eager"]
    kept = ["--api-key", "***", "--max-model-len", 2048, "--hf_token", "***", "--enforce-eager"]
    assert redacted({"args": args}) == {"args": kept}
    assert redacted({"args": ["--api-key", "--enforce-eager"]}) == {"args": ["--api-key", "--enforce-eager"]}
