"""Settings: flags override the environment, and errors name the setting and its value."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from model import PRETRAINED
from server.settings import Settings, SettingsError, read_settings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without settings."""
    for name in os.environ:
        if name.upper().startswith("LATENTD_"):
            monkeypatch.delenv(name)


def refusal(**flags: object) -> str:
    with pytest.raises(SettingsError) as caught:
        read_settings(flags)
    return str(caught.value)


def test_nothing_has_to_be_set() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.checkpoint == PRETRAINED
    assert settings.threads is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("data_dir", "some/folder", Path("some/folder")),
        ("threads", "3", 3),
        ("stream_keepalive_s", "0.5", 0.5),
        ("device", "cpu", "cpu"),
        ("host_cache_bytes", "0", 0),
        ("model_name", "5", "5"),
        ("response_ttl_s", "60", 60.0),
        ("response_ttl_s", "inf", None),
        ("key_file", "keys.json", Path("keys.json")),
        ("cors_origins", "https://a.example,http://b:80", ("https://a.example", "http://b:80")),
        ("key_tokens_per_minute", "5", 5),
        ("unix_socket", "some.socket", Path("some.socket")),
        ("root_path", "/a/b", "/a/b"),
        ("trusted_proxies", "10.0.0.0/8,::1", ("10.0.0.0/8", "::1")),
        ("allowed_hosts", "a.example,*.b.example", ("a.example", "*.b.example")),
        ("metrics_address", "[::1]:9090", "[::1]:9090"),
        ("metrics_names", "vllm", "vllm"),
        ("log_format", "json", "json"),
        ("otel", "true", True),
    ],
)
def test_the_environment_sets_and_a_flag_wins(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    default = getattr(read_settings({}), name)
    monkeypatch.setenv(f"LATENTD_{name.upper()}", text)
    assert getattr(read_settings({}), name) == value != default
    assert getattr(read_settings({name: default}), name) == default


def test_a_variable_may_be_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("latentd_port", "9")
    assert read_settings({}).port == 9


def test_a_wrong_variable_does_not_matter_where_a_flag_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LATENTD_PORT", "none")
    assert read_settings({"port": 1}).port == 1


@pytest.mark.parametrize("name", ["LATENTD_PROT", "latentd_prot", "LATENTD_", "LATENTD_PORT_"])
def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert refusal() == f"{name}: unknown setting"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LATENTD_PORT", "tcp://10.96.0.7:8000"),
        ("LATENTD_PORT_8000_UDP", "udp://10.96.0.7:8000"),
        ("LATENTD_SERVICE_HOST", "10.96.0.7"),
        ("LATENTD_GPU_SERVICE_HOST", "10.96.0.7"),
    ],
)
def test_a_link_of_kubernetes_to_a_service_is_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """It comes from a service called latentd, and would otherwise look like a wrong setting."""
    monkeypatch.setenv("LATENTD_PORT_8000_TCP_PROTO", "tcp")  # one that looks like nothing special
    monkeypatch.setenv(name, value)
    refused = refusal()
    assert refused.startswith(f"{name}: {value!r}: this is a Kubernetes service link")
    assert refused.endswith("set enableServiceLinks: false in the pod spec")
    assert "\n" not in refused


def test_variables_of_others_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "LATENT_PORT", "LATENTDPORT", "HOST"):
        monkeypatch.setenv(name, "wrong")
    assert read_settings({}) == Settings()


WRONG: list[tuple[str, Any]] = [
    ("port", "eighty"),
    ("port", ""),
    ("port", "65536"),
    ("port", "-1"),
    ("threads", "0"),
    ("threads", "null"),
    ("device", "tpu"),
    ("log_level", "INFO"),
    ("max_running", "0"),
    ("host_cache_bytes", "1.5"),
    ("host_cache_bytes", "-1"),
    ("stream_keepalive_s", "0"),
    ("stream_keepalive_s", "nan"),
    ("drain_timeout_s", "inf"),
    ("request_timeout_s", "0"),
    ("request_timeout_s", "inf"),
    ("max_waiting_tokens", "0"),
    ("inter_token_latency_ms", "0"),
    ("prefix_cache_bytes", "-1"),
    ("drain_timeout_s", "-1"),
    ("response_ttl_s", "0"),
    ("response_ttl_s", "nan"),
    ("response_ttl_s", "never"),
    ("key_requests_per_minute", "0"),
    ("tokens_per_minute", "-5"),
    ("header_timeout_s", "0"),
    ("body_timeout_s", "nan"),
    ("root_path", "a"),
    ("root_path", "/a/"),
    ("metrics_address", "9090"),
    ("metrics_address", "::1:9090"),
    ("log_format", "text"),
    ("tls_key", "key.pem"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert refusal(**{name: value}).startswith(f"{flag}: {value!r}: ")
    variable = f"LATENTD_{name.upper()}"
    monkeypatch.setenv(variable, value)
    assert refusal().startswith(f"{variable}: {value!r}: ")


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://", "", "null"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    assert "an origin is" in refusal(cors_origins=("https://good.example", origin))
    assert read_settings({"cors_origins": ["*"]}).cors_origins == ("*",)


def test_proxies_are_addresses() -> None:
    assert "'proxy.example' does not appear" in refusal(trusted_proxies="10.0.0.1,proxy.example")
    assert read_settings({"trusted_proxies": "*"}).trusted_proxies == ("*",)


def test_a_unix_socket_has_no_certificate() -> None:
    flags = {"unix_socket": "some.socket", "tls_certificate": "cert.pem"}
    assert "TLS is not supported on a Unix socket" in refusal(**flags)
    assert read_settings({"tls_certificate": "cert.pem", "tls_key": "key.pem"}).tls_key


def test_an_unknown_flag_is_named() -> None:
    assert refusal(prot=1).startswith("--prot: 1: ")


def test_settings_do_not_change() -> None:
    settings = read_settings({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "latentd"),
        ({"checkpoint": "some/where/tiny"}, "tiny"),
        ({"checkpoint": "some/where/../tiny/."}, "tiny"),
        ({"checkpoint": "tiny", "model_name": "mine"}, "mine"),
        ({"model_name": "mine"}, "mine"),
    ],
)
def test_the_name_that_clients_use(flags: dict[str, object], name: str) -> None:
    assert read_settings(flags).served_name == name


def test_every_setting_explains_itself() -> None:
    for name, field in Settings.model_fields.items():
        assert (field.description or "").endswith("."), name


@pytest.mark.parametrize("value", ["", ",", " ", ",,"])
def test_an_empty_key_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LATENTD_API_KEY", value)
    assert refusal().startswith("LATENTD_API_KEY: ")


@pytest.mark.parametrize("wrong", ["bad secret", "schlüssel", "tab\t"])
def test_no_key_is_in_a_message(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("LATENTD_API_KEY", f"good-key,{wrong}")
    logged = refusal()
    assert logged.startswith("LATENTD_API_KEY: ")
    assert "good-key" not in logged
    assert wrong not in logged


@pytest.mark.parametrize(
    ("settings", "has_keys"),
    [({}, False), ({"api_key": ("a",)}, True), ({"key_file": Path("keys.json")}, True)],
)
def test_keys_are_asked_for_where_any_can_be(settings: dict[str, Any], has_keys: bool) -> None:
    assert read_settings(settings).has_keys is has_keys
