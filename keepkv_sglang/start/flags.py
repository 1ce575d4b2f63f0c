"""Flags for `launch_server`, `sglang serve` and `sgl.Engine`, and what cannot be combined with KeepKV.

SGLang's ServerArgs is a sealed record: flags of ours travel as its private attribute ``_keepkv``, which is
pickled along to every child process. Everything else reads it through `config_of`.

SGLang is imported where it is used: this file is loaded in every process, and those imports take seconds.
"""

from __future__ import annotations

import argparse
import logging
import sys
from importlib.util import find_spec
from typing import Any, NoReturn

from keepkv_sglang.settings.config import OPTIONS, ConfigError, KeepKVConfig, from_text
from keepkv_sglang.start import platform, refuse, seams

logger = logging.getLogger("keepkv")

ATTRIBUTE = "_keepkv"
RADIX_BACKEND = "keepkv"
WARMUP = "keepkv"  # name in SGLang's --warmups: hooks/warm_up.py
CPU_BACKEND = "keepkv_cpu"
TRITON_BACKEND = "keepkv_triton"
FLASHINFER_BACKEND = "keepkv_flashinfer"
BACKEND_DEVICES = {CPU_BACKEND: "cpu", TRITON_BACKEND: "cuda", FLASHINFER_BACKEND: "cuda"}
AUTO_BACKEND = {"cpu": CPU_BACKEND, "cuda": TRITON_BACKEND}
"""What --attention-backend auto means: SGLang's Triton kernels run on every CUDA device that it supports."""


def flag_name(field: str) -> str:
    """`budget` -> `keepkv_budget`; `enabled` -> `enable_keepkv`."""
    return "enable_keepkv" if field == "enabled" else f"keepkv_{field}"


def config_of(server_args: Any) -> KeepKVConfig:
    """The configuration attached to SGLang's ServerArgs; KeepKV off when none is."""
    return getattr(server_args, ATTRIBUTE, None) or KeepKVConfig()


def has_flags(server_args: Any) -> bool:
    """True when ServerArgs came through our hooks, so that "off" is known to be the user's choice."""
    return hasattr(server_args, ATTRIBUTE)


def _argparse_type(field: str) -> Any:
    def parse(text: str) -> Any:
        try:
            return from_text(field, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parse.__name__ = field  # argparse prints this name when the message is its own
    return parse


def add_cli_args(_result: Any, parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> None:
    """AFTER hook on ServerArgs.add_cli_args. No flags where the hook that reads them cannot sit: --enable-keepkv would
    be taken, and a server without KeepKV would start."""
    readers = [seam for seam in seams.HOOKS if seam.target.endswith(".from_cli_args")]
    broken = [row for row in map(seams.check, readers) if not row.ok]
    if broken:
        logger.warning("KeepKV adds no flags, %s: %s", broken[0].name, broken[0].reason)
        return
    group = parser.add_argument_group("KeepKV (keepkv-sglang plugin)")
    defaults = KeepKVConfig()
    for field, option in OPTIONS.items():
        name, text = "--" + flag_name(field).replace("_", "-"), option.help.replace("%", "%%")
        if field == "enabled":
            group.add_argument(name, action="store_true", help=text)
            continue
        default, shown = getattr(defaults, field), shown_default(field)
        extra: dict[str, Any] = {"choices": option.choices} if option.choices else {}
        unit = f" Unit: {option.unit}." if option.unit else ""
        if option.on_gpu is not None:
            default = argparse.SUPPRESS  # what the user left out is only known to be so if it is not there
        group.add_argument(
            name, type=_argparse_type(field), default=default, help=f"{text}{unit} Default: {shown}.", **extra
        )
    _explain_switch(parser)


def shown_default(field: str) -> str:
    """The default as help and docs/flags.md show it."""
    value, on_gpu = getattr(KeepKVConfig(), field), OPTIONS[field].on_gpu
    text = "off" if value is False else "none" if value == "" else str(value)
    return text if on_gpu is None else f"{text}, on a GPU {on_gpu}"


def _explain_switch(parser: argparse.ArgumentParser) -> None:
    """argparse's message for `--enable-keepkv=true` does not say what to write instead."""
    original = parser.error

    def error(message: str) -> NoReturn:
        if "--enable-keepkv" in message and "explicit argument" in message:
            message += "; it is a switch: write --enable-keepkv alone, or leave it out"
        original(message)

    parser.error = error  # type: ignore[method-assign]


def _choose_backends(values: dict[str, Any]) -> dict[str, Any]:
    """--enable-keepkv alone selects our backends; a choice by the user that cannot run is an error. Returns the fields
    whose defaults are others on this device."""
    device = str(values.get("device") or default_device()).partition(":")[0]
    if device not in AUTO_BACKEND:
        raise ConfigError(
            f"KeepKV has no attention backend for {device}: use --device cpu on a machine without an accelerator, or "
            "start the server without --enable-keepkv"
        )
    wanted = values.get("attention_backend")
    values["attention_backend"] = AUTO_BACKEND[device] if wanted in (None, "auto") else wanted
    chosen = values["attention_backend"]
    _check_backend(chosen, device)
    for name in ("prefill_attention_backend", "decode_attention_backend"):
        if values.get(name) not in (None, chosen):  # SGLang would run two backends, each with window queries of its own
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {values[name]} beside {chosen}: KeepKV needs one backend for both; leave it out")
    if chosen == FLASHINFER_BACKEND:
        logger.warning(
            "No server with %s has run on a GPU where KeepKV is developed (docs/gpu.md says what has). Run "
            "scripts/gpu_check.sh, and compare answers with those of a server without KeepKV, before you rely on it.",
            chosen,
        )
    if values.get("radix_cache_backend") not in (None, RADIX_BACKEND):
        raise ConfigError(
            f"--radix-cache-backend {values['radix_cache_backend']} cannot hold compressed prefixes; leave it out"
        )
    values["radix_cache_backend"] = RADIX_BACKEND
    if device != "cpu" or values.get("keepkv_pressure", KeepKVConfig().pressure) != "off":
        values["warmups"] = ",".join(filter(None, [values.get("warmups"), WARMUP]))
    return {} if device == "cpu" else {f: o.on_gpu for f, o in OPTIONS.items() if o.on_gpu is not None}


def _check_off(values: dict[str, Any]) -> None:
    """Without --enable-keepkv: ConfigError for our cache, which would do nothing; one line for our attention kernels,
    which run without votes."""
    if values.get("radix_cache_backend") == RADIX_BACKEND:
        raise ConfigError(
            f"--radix-cache-backend {RADIX_BACKEND} works with KeepKV only: add --enable-keepkv, or leave it out"
        )
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if values.get(field) in BACKEND_DEVICES:
            flag = "--" + field.replace("_", "-")
            print(
                f"keepkv: {flag} {values[field]} without --enable-keepkv: KeepKV's attention kernels run, nothing is "
                "compressed; add --enable-keepkv",
                file=sys.stderr,
            )


def _warn_off(config: KeepKVConfig) -> None:
    """One line where flags were given that do nothing."""
    defaults = KeepKVConfig()
    idle = [flag_name(field) for field in OPTIONS if getattr(config, field) != getattr(defaults, field)]
    if idle:
        print(
            f"keepkv: {', '.join(idle)} without enable_keepkv: KeepKV is off and nothing is compressed; "
            "add --enable-keepkv (Engine: enable_keepkv=True)",
            file=sys.stderr,
        )


def _check_backend(name: str, device: str) -> None:
    """ConfigError for a backend that knows no votes or cannot run on this device."""
    usable = " or ".join(known for known, needs in BACKEND_DEVICES.items() if needs == device)
    if name not in BACKEND_DEVICES:
        raise ConfigError(f"--attention-backend {name} cannot weight attention by votes; leave it out or use {usable}")
    if BACKEND_DEVICES[name] != device:
        raise ConfigError(
            f"--attention-backend {name} runs on {BACKEND_DEVICES[name]} devices and this server's device is {device}; "
            f"leave it out or use {usable}"
        )
    if name == FLASHINFER_BACKEND and find_spec("flashinfer") is None:
        raise ConfigError(
            f"--attention-backend {name} needs FlashInfer: pip install flashinfer-python, or use {TRITON_BACKEND}"
        )


def default_device() -> str:
    """The device SGLang will choose here, as far as our platform decides it."""
    return (platform.accelerator() or "cpu").lower()


def before_from_cli_args(cls: Any, args: argparse.Namespace) -> None:
    """BEFORE hook on ServerArgs.from_cli_args: choose our backends while they are still plain values."""
    values = vars(args)
    with _ExitOnConfigError():
        if values.get("enable_keepkv"):
            for field, default in _choose_backends(values).items():
                values.setdefault(flag_name(field), default)
        else:
            _check_off(values)


def after_from_cli_args(server_args: Any, _cls: Any, args: argparse.Namespace) -> Any:
    """AFTER hook on ServerArgs.from_cli_args: attach the configuration, refuse what cannot work."""
    defaults = KeepKVConfig()
    with _ExitOnConfigError():
        config = KeepKVConfig(**{f: getattr(args, flag_name(f), getattr(defaults, f)) for f in OPTIONS})
        attach(server_args, config)
    return server_args


def engine_server_args(server_args_class: Any) -> Any:
    """What Engine.server_args_class becomes: ServerArgs that also takes our keyword arguments."""

    def build(**kwargs: Any) -> Any:
        taken = {f: kwargs.pop(flag_name(f)) for f in OPTIONS if flag_name(f) in kwargs}
        config = KeepKVConfig(**taken)
        if config.enabled:
            config = KeepKVConfig(**_choose_backends(kwargs) | taken)
        else:
            _check_off(kwargs)
        server_args = server_args_class(**kwargs)
        attach(server_args, config)
        return server_args

    return build


def attach(server_args: Any, config: KeepKVConfig) -> None:
    """Check the combination and store the configuration on ServerArgs. Raises ConfigError."""
    if platform.decide().active:
        refuse.check_cpu(server_args)
    if config.enabled:
        from sglang.srt.environ import envs

        seams.require()
        refuse.check_server_args(server_args)
        refuse.check_environment(envs)
        refuse.check_preferred(server_args, config)
        refuse.check_record(config.record)
        _check_model(server_args)
    else:
        _warn_off(config)
    setattr(server_args, ATTRIBUTE, config)


def _check_model(server_args: Any) -> None:
    """Refuses a model before any process is started. A model SGLang cannot read is left for SGLang to report."""
    from sglang.srt.configs.model_config import ModelConfig

    try:
        model_config = ModelConfig.from_server_args(server_args)
    except Exception as error:  # whatever is wrong with the model, SGLang's own message is the better one
        logger.debug("the model could not be inspected before the start: %s", error)
        return
    refuse.check_model(model_config)


class _ExitOnConfigError:
    """On the command line a refusal is one clear line and exit status 2, not a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, ConfigError):
            print(f"keepkv: {error}", file=sys.stderr)
            raise SystemExit(2)
