"""Translates the keys of the SpeeDiT and SpeeD reference configs to this project's.

A `_target_` is only compared with the names below, never called. Table and reasons: `docs/configs.md`.
"""

import copy
import re
from typing import Any

from speedit_plugins.trainer.config.key_names import join
from speedit_plugins.trainer.config.validation import ConfigError

Layer = dict[str, Any]

# Targets that each section may name, and the `type` that replaces them.
_TARGETS: dict[str, tuple[tuple[str, str], ...]] = {
    "model": ((r"speed\.networks\.dit(?:\.dit)?\.DiT_(S|B|L|XL)_([248])", r"DiT-\1/\2"),),
    "diffusion": (
        (r"speed\.diffusion(?:\.iddpm|\.speed)?\.(?:IDDPM|Speed_IDDPM)", "SpeeDiffusion"),
        (r"speed\.diffusion(?:\.iddpm|\.speed)?(?:\.speed)?\.SpeeDiffusion", "SpeeDiffusion"),
    ),
    "encoder": ((r"diffusers(?:\.models)?\.AutoencoderKL\.from_pretrained", "AutoencoderKL"),),
    "optimizer": ((r"torch\.optim\.AdamW", "AdamW"),),
    "data.dataset": ((r"speed\.dataset\.image\.image_data(?:est|set)", "ImageFolder"),),
    "condition_encoder": ((r"speed\.networks\.condition(?:\.classes)?\.ClassEncoder", ""),),
}
_RENAMED = {
    "resume_training": "resume",
    "cfg_scale": "guidance_scale",
    "max_iters": "max_training_steps",
    "vae": "encoder",
}
# Flags that matter only when true. Then they ask for something that this project does not have.
_UNSUPPORTED_FLAGS = {
    "save_firt_step_ckpt": "not supported: ckpt_every decides; wanted false",
    "diffusion.use_kl": "not supported: the loss is mse with the vb term; wanted false",
    "data.dataset.text_cond": "text conditions are not supported yet; wanted false",
}
_SPEED_KEYS = ("weighting", "sampling", "k", "lam", "tau")
# (sampling, weighting) of Speed_IDDPM -> the name of the same policy, for those that have one.
_NAMED_POLICIES = {
    ("thinned", "change_aware"): "speed",
    ("uniform", "constant"): "uniform",
    ("uniform", "p2"): "p2",
    ("uniform", "min_snr"): "min_snr",
    ("logit_normal", "constant"): "logit_normal",
    ("clts", "constant"): "clts",
}
_SAMPLINGS = {
    "ours": "thinned",
    "speed": "thinned",
    "no_dual": "thinned",
    "uniform": "uniform",
    "lognorm": "logit_normal",
    "clts": "clts",
}
_WEIGHTINGS = {
    "ours": "change_aware",
    "theory": "change_aware",
    "p2": "p2",
    "min_snr": "min_snr",
    "none": "constant",
    "lognorm": "constant",
}
_THEORY_LAM = 0.8  # the reference's released "theory" branch computes with 1 - lam = 0.2


class ReferenceKeys:
    """Translates one config layer by layer, and remembers the old keys of earlier layers.

    Args:
        phase: in inference and sample a respacing means sampler steps, in train a shorter process.

    Attributes:
        notes: one line per translated key, in order, each once.
    """

    def __init__(self, phase: str) -> None:
        self.notes: dict[str, None] = {}
        self._phase = phase
        self._policy: Layer = {}
        self._epoch: Any = None
        self._is_reference_model = False

    def translate(self, layer: Layer) -> Layer:
        """The layer in this project's keys. Does not change the argument.

        Raises:
            ConfigError: a `_target_`, a name or an option has no equivalent here.
        """
        layer = copy.deepcopy(layer)
        _drop_empty_targets(layer)
        for key, reason in _UNSUPPORTED_FLAGS.items():
            self._drop_flag(layer, key, reason)
        self._rename(layer)
        self._drop(layer)
        self._wandb(layer)
        self._model(layer)
        self._policy_keys(layer)
        self._targets(layer)
        self._options(layer)
        self._respacing(layer)
        return layer

    def finish(self, merged: Layer) -> Layer:
        """Translates what depends on all layers: `epoch`, and the model's sizes that the reference derives.

        Raises:
            ConfigError: train has `epoch` but no `max_training_steps`.
        """
        model, size = merged.get("model"), merged.get("image_size")
        if self._is_reference_model and isinstance(model, dict) and isinstance(size, int):
            # The reference has one autoencoder. It makes 4 channels at an eighth of the size.
            merged["model"] = {"input_size": size // 8, "in_channels": 4, **model}
        if self._epoch is not None:
            self._check_epoch(merged)
        return merged

    def _check_epoch(self, merged: Layer) -> None:
        if self._phase == "train" and not merged.get("max_training_steps"):
            raise ConfigError(
                "epoch",
                "the length of training is counted in steps; wanted max_training_steps"
                f" (epochs * images // batch size), got epoch {self._epoch}",
            )
        self._note("epoch", "dropped: max_training_steps ends the training")

    def _rename(self, layer: Layer) -> None:
        for old, new in _RENAMED.items():
            if old not in layer:
                continue
            value = layer.pop(old)
            if value is None:
                continue
            if new in layer:
                raise ConfigError(old, f"is the old name of {new}; wanted one of the two, got both")
            layer[new] = value
            self._note(old, new)

    def _drop_flag(self, layer: Layer, path: str, reason: str) -> None:
        section, name = _section(layer, path)
        if name not in section:
            return
        if section.pop(name):
            raise ConfigError(path, reason)
        self._note(path, "dropped: it is off")

    def _drop(self, layer: Layer) -> None:
        encoder = layer.pop("condition_encoder", None)
        if encoder is not None:
            target = encoder.get("_target_") if isinstance(encoder, dict) else encoder
            _translate_target("condition_encoder", target)
            self._note("condition_encoder", "dropped: the model embeds class labels")
        if "epoch" in layer:
            self._epoch = layer.pop("epoch")
        enabled, every = layer.pop("enable_sample_log", None), layer.pop("sample_log_every", None)
        if enabled:
            layer["sample_every"] = 100 if every is None else every
            self._note("enable_sample_log", f"sample_every: {layer['sample_every']}")
        elif enabled is not None or every is not None:
            self._note("sample_log_every", "dropped: enable_sample_log is off")

    def _wandb(self, layer: Layer) -> None:
        """The arguments of wandb.init. Only the project has a key here."""
        section = layer.pop("wandb", None)
        if section is None:
            return
        arguments = dict(section) if isinstance(section, dict) else {}
        project = arguments.pop("project", None)
        if project is not None:
            if "wandb_project" in layer:
                raise ConfigError("wandb.project", "wanted either this key or wandb_project, got both")
            layer["wandb_project"] = project
            self._note("wandb.project", "wandb_project")
        dropped = ", ".join(key for key in arguments if key != "_target_")
        if dropped or project is None:
            self._note(f"wandb: {dropped}" if dropped else "wandb", "dropped: wandb_project alone is taken")

    def _model(self, layer: Layer) -> None:
        model = layer.get("model")
        if isinstance(model, dict) and "_target_" in model and "condition" in model:
            condition = str(model.pop("condition") or "none").lower()
            if condition not in ("class", "none"):
                raise ConfigError("model.condition", f"wanted class or none, got {condition!r}")
            if condition == "none":
                layer["num_classes"] = model["num_classes"] = 0
            self._note(f"model.condition: {condition}", "num_classes (0 without a condition)")

    def _policy_keys(self, layer: Layer) -> None:
        """faster, weighting, sampling, k, lam, tau, also of earlier layers -> diffusion.policy."""
        section = layer.get("diffusion")
        if not isinstance(section, dict):
            return
        speed = {key: section.pop(key) for key in _SPEED_KEYS if key in section}
        faster = {"faster": section.pop("faster")} if "faster" in section else {}
        target = str(section.get("_target_", "")).rpartition(".")[2]
        if "policy" in section:
            if speed or faster:
                old = next(iter({**faster, **speed}))
                raise ConfigError(f"diffusion.{old}", "wanted either this key or diffusion.policy, got both")
            self._policy = {}
            return
        if faster and (speed or target == "Speed_IDDPM"):
            raise ConfigError("diffusion.faster", "belongs to IDDPM, not to Speed_IDDPM; got keys of both")
        if not (speed or faster or target):
            return
        is_speed = bool(speed) or target == "Speed_IDDPM"
        if is_speed != self._policy.get("is_speed", is_speed):
            self._policy = {}
        self._policy.update({**speed, **faster, "is_speed": is_speed})
        section["policy"] = _speed_policy(self._policy) if is_speed else _faster_policy(self._policy)
        self._note(_named_keys({**faster, **speed}) or target, f"diffusion.policy: {section['policy']}")

    def _targets(self, layer: Layer) -> None:
        for path in _TARGETS:
            parent, name = _section(layer, path)
            section = parent.get(name)
            if isinstance(section, dict) and "_target_" in section:
                target = section.pop("_target_")
                if "type" in section:
                    raise ConfigError(path, "wanted either `type` or `_target_`, got both")
                section["type"] = _translate_target(path, target)
                if path == "data.dataset":
                    # The reference always mirrors. Here that is a choice.
                    section.setdefault("random_flip", True)
                self._is_reference_model |= path == "model"
                self._note(target, f"{path}.type: {section['type']}")
        for path in _leftover_targets(layer):
            raise ConfigError(path, "is never called; wanted `type: NAME` of a registered class")

    def _options(self, layer: Layer) -> None:
        """Translates single arguments of the sections."""
        encoder, diffusion = layer.get("encoder"), layer.get("diffusion")
        old = "pretrained_model_name_or_path"
        if isinstance(encoder, dict) and old in encoder:
            encoder["path"] = encoder.pop(old)
            self._note(f"vae.{old}", "encoder.path")
        if isinstance(diffusion, dict) and "predict_xstart" in diffusion:
            diffusion["prediction_type"] = "x0" if diffusion.pop("predict_xstart") else "epsilon"
            self._note("diffusion.predict_xstart", f"prediction_type: {diffusion['prediction_type']}")
        parent, name = _section(layer, "data.dataset")
        dataset = parent.get(name)
        if isinstance(dataset, dict) and dataset.get("ann_path", "") is None:
            del dataset["ann_path"]

    def _respacing(self, layer: Layer) -> None:
        diffusion = layer.get("diffusion")
        if not isinstance(diffusion, dict) or "timestep_respacing" not in diffusion:
            return
        respacing = diffusion["timestep_respacing"]
        # Unquoted digits on a command line become an int, and an empty value in YAML becomes null.
        respacing = "" if respacing is None else str(respacing) if type(respacing) is int else respacing
        is_training = self._phase not in ("inference", "sample")
        diffusion["timestep_respacing"] = respacing if is_training else ""
        if respacing and not is_training:
            sampler = sampler_of(respacing)
            stated = layer.get("sampler")
            layer["sampler"] = {**sampler, **stated} if isinstance(stated, dict) else sampler
            self._note(f"diffusion.timestep_respacing: {respacing}", f"sampler: {sampler}")

    def _note(self, old: str, new: str) -> None:
        self.notes.setdefault(f"{old} -> {new}")


def sampler_of(respacing: str) -> Layer:
    """'250' -> DDPM with 250 steps; 'ddim50' -> DDIM with 50.

    Raises:
        ConfigError: several sections ('10,20,30'); a sampler has no sections.
    """
    match = re.fullmatch(r"(ddim)?([1-9]\d*)", str(respacing).strip())
    if match is None:
        wanted = "wanted a number of steps, '250' or 'ddim50'"
        raise ConfigError("diffusion.timestep_respacing", f"{wanted}, got {respacing!r}")
    return {"type": match[1] or "ddpm", "num_steps": int(match[2])}


def _faster_policy(said: Layer) -> Layer:
    faster = said.get("faster", False)
    if not isinstance(faster, bool):
        raise ConfigError("diffusion.faster", f"wanted bool, got {faster!r}")
    return {"type": "speedit" if faster else "uniform"}


def _speed_policy(said: Layer) -> Layer:
    """The policy for Speed_IDDPM's arguments. Missing ones take this project's defaults, k 5 and lam 0.6."""
    sampling = _choice("sampling", said, _SAMPLINGS)
    weighting = _choice("weighting", said, _WEIGHTINGS)
    density: Layer = {key: said[key] for key in ("k", "tau") if sampling == "thinned" and key in said}
    lam = {"lam": said["lam"]} if "lam" in said else {}
    if str(said.get("weighting")).lower() == "theory":
        lam = {"lam": _THEORY_LAM}
    weights = lam if weighting == "change_aware" else {}
    named = _NAMED_POLICIES.get((sampling, weighting))
    if named is not None:
        return {"type": named, **density, **weights}
    return {"density": {"type": sampling, **density}, "weighting": {"type": weighting, **weights}}


def _choice(key: str, said: Layer, known: dict[str, str]) -> str:
    # For an unknown name the reference trains without any weights. Its "none" can also be null.
    name = "none" if key in said and said[key] is None else str(said.get(key, "ours")).lower()
    if name not in known:
        raise ConfigError(f"diffusion.{key}", f"wanted one of {', '.join(known)}, got {said[key]!r}")
    return known[name]


def _translate_target(path: str, target: Any) -> str:
    for pattern, replacement in _TARGETS[path]:
        match = re.fullmatch(pattern, str(target))
        if match is not None:
            return match.expand(replacement)
    known = ", ".join(re.sub(r"\(\?:.*?\)\??|\\", "", pattern) for pattern, _ in _TARGETS[path])
    raise ConfigError(f"{path}._target_", f"no equivalent here; wanted `type:` or {known}, got {target!r}")


def _section(layer: Layer, path: str) -> tuple[Layer, str]:
    """The mapping in which the last name of `path` may be (empty if there is none), and that name."""
    parent, _, name = path.rpartition(".")
    section: Any = layer
    for part in parent.split(".") if parent else ():
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), name


def _named_keys(keys: Layer) -> str:
    return ", ".join(f"diffusion.{key}: {value}" for key, value in keys.items())


def _drop_empty_targets(section: Layer) -> None:
    if section.get("_target_", "") is None:
        del section["_target_"]
    for value in section.values():
        if isinstance(value, dict):
            _drop_empty_targets(value)


def _leftover_targets(section: Layer, path: str = "") -> list[str]:
    found = [join(path, "_target_")] if "_target_" in section else []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _leftover_targets(value, join(path, str(key)))
    return found
