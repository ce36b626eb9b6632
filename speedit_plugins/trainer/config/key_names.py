"""What other trainers call the keys and values of a config, for the hint after a name that is not known here.

Standard library only, like `schema.py`. The tables are data: a new name is a new entry.
"""

import difflib
import re
from collections.abc import Collection, Sequence

# A key here, and the names that diffusers' scripts, kohya's sd-scripts, Lightning, transformers, mmengine and
# DiT's train.py give it.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "experiment_dir": (
        "output_dir",
        "out_dir",
        "work_dir",
        "save_dir",
        "results_dir",
        "log_dir",
        "logging_dir",
        "exp_dir",
        "output_path",
        "out",
        "outdir",
    ),
    "experiment_name": ("name", "run_name", "exp_name", "output_name"),
    "seed": ("random_seed", "global_seed", "manual_seed", "seed_everything", "rng_seed"),
    "device": ("accelerator", "device_type"),
    "precision": ("mixed_precision", "dtype", "amp", "fp16", "bf16", "use_fp16", "use_amp", "weight_dtype"),
    "allow_download": ("download", "local_files_only", "offline"),
    "num_classes": ("n_classes", "nclasses", "classes", "num_class"),
    "image_size": ("resolution", "img_size", "size", "height", "width", "image_resolution", "res"),
    "num_frames": ("frames", "n_frames", "video_length", "frame_num", "num_video_frames"),
    "voxel_size": ("voxel_resolution", "voxels", "grid_size"),
    "num_points": ("npoints", "n_points", "num_sample_points"),
    "caption_dropout_prob": (
        "caption_dropout_rate",
        "cond_dropout",
        "proportion_empty_prompts",
        "uncond_prob",
    ),
    "max_training_steps": (
        "max_steps",
        "steps",
        "num_steps",
        "max_train_steps",
        "train_steps",
        "training_steps",
        "num_train_steps",
        "num_training_steps",
        "total_steps",
        "n_steps",
        "iterations",
        "num_iterations",
        "max_iterations",
        "max_iter",
        "train_iters",
        "iters",
    ),
    "resume": ("resume_from", "resume_from_checkpoint", "resume_checkpoint", "resume_path", "load_from"),
    "pretrained": (
        "pretrained_path",
        "pretrained_weights",
        "pretrained_model",
        "init_from",
        "finetune_from",
        "initial_weights",
    ),
    "ckpt_path": ("ckpt", "checkpoint", "checkpoint_path", "weights", "model_path", "sample_ckpt"),
    "ckpt_every": (
        "save_every",
        "save_steps",
        "save_freq",
        "save_interval",
        "save_every_n_steps",
        "checkpointing_steps",
        "checkpoint_every",
        "ckpt_interval",
        "checkpoint_interval",
        "save_model_every",
    ),
    "keep_last": ("checkpoints_total_limit", "save_total_limit", "max_checkpoints", "max_keep_ckpts"),
    "log_every": (
        "log_interval",
        "logging_steps",
        "log_freq",
        "log_every_n_steps",
        "print_freq",
        "log_steps",
    ),
    "sample_every": ("sample_steps", "sample_interval", "sample_every_n_steps", "sample_freq", "image_every"),
    "enable_wandb_log": ("use_wandb", "report_to", "logger", "log_with"),
    "wandb_project": ("project", "project_name", "tracker_project_name"),
    "compile": ("torch_compile", "use_compile", "compile_model"),
    "plugin": ("strategy", "distributed_strategy", "parallel", "fsdp", "deepspeed", "zero_stage"),
    "data.batch_size": (
        "batch_size",
        "train_batch_size",
        "global_batch_size",
        "bs",
        "batch",
        "micro_batch_size",
        "per_device_train_batch_size",
    ),
    "data.num_workers": ("num_workers", "workers", "dataloader_num_workers", "n_workers", "loader_workers"),
    "data.dataset": ("dataset", "dataset_name", "train_dataset", "dataset_type"),
    "data.dataset.root": (
        "data_dir",
        "data_path",
        "data_root",
        "dataset_dir",
        "dataset_path",
        "train_data_dir",
        "image_dir",
        "image_folder",
        "root",
    ),
    "optimizer.lr": ("lr", "learning_rate", "base_lr", "max_lr", "peak_lr"),
    "optimizer.type": ("optimizer_type", "optim", "optimizer_name"),
    "optimizer.weight_decay": ("weight_decay", "wd", "adam_weight_decay"),
    "optimizer.betas": ("betas", "adam_betas", "beta1", "adam_beta1", "beta2", "adam_beta2"),
    "optimizer.warmup_steps": (
        "warmup_steps",
        "warmup",
        "lr_warmup_steps",
        "num_warmup_steps",
        "warmup_iters",
    ),
    "optimizer.schedule": ("lr_scheduler", "scheduler", "lr_schedule", "lr_scheduler_type"),
    "optimizer.min_lr": ("min_lr", "lr_min", "eta_min", "final_lr"),
    "optimizer.max_grad_norm": (
        "max_grad_norm",
        "grad_clip",
        "clip_grad",
        "gradient_clip_val",
        "grad_clip_norm",
        "clip_grad_norm",
        "max_norm",
    ),
    "optimizer.grad_accumulation": (
        "gradient_accumulation_steps",
        "grad_accum",
        "accumulate_grad_batches",
        "accumulation_steps",
        "grad_accumulation_steps",
        "accum_iter",
    ),
    "sampler.num_steps": (
        "steps",
        "num_steps",
        "num_inference_steps",
        "inference_steps",
        "sampling_steps",
        "num_sampling_steps",
        "sample_num_steps",
        "ddim_steps",
        "infer_steps",
    ),
    "sampler.type": ("sampling_method", "sample_method", "sampler_name"),
    "sampler.eta": ("eta", "ddim_eta"),
    "guidance_scale": (
        "cfg",
        "guidance",
        "cfg_weight",
        "guidance_weight",
        "cfg_strength",
        "classifier_free_guidance",
    ),
    "sample_prompts": ("prompts", "prompt", "validation_prompt", "validation_prompts"),
    "sample_classes": ("class_labels", "labels", "sample_labels"),
    "num_samples": ("num_fid_samples", "n_samples", "num_images", "sample_num"),
    "per_proc_batch_size": ("sample_batch_size", "eval_batch_size", "inference_batch_size"),
    "frames_per_second": ("fps", "save_fps", "frame_rate"),
    "diffusion.policy": ("policy", "timestep_sampling", "timestep_sampler", "schedule_sampler"),
    "diffusion.prediction_type": ("prediction_type", "parameterization", "objective", "pred_type"),
    "diffusion.diffusion_steps": ("diffusion_steps", "timesteps", "num_timesteps", "num_train_timesteps"),
    "diffusion.noise_schedule": ("noise_schedule", "beta_schedule", "beta_scheduler"),
    "diffusion.shift": ("shift", "flow_shift", "timestep_shift", "discrete_flow_shift"),
    "evaluation.metrics": ("metrics", "metric"),
    "routing.keep": ("tread", "token_routing", "selection_rate", "token_dropping"),
    "alignment.type": ("repa", "sra", "representation_alignment"),
    "alignment.weight": ("proj_coeff", "repa_weight", "align_weight"),
    "alignment.layer": ("encoder_depth", "align_layer"),
    "alignment.teacher": ("enc_type", "teacher_model"),
    "alignment.until": ("haste", "stop_alignment_at"),
    "masking.type": ("mdt", "masked_training", "use_mask"),
    "masking.ratio": ("mask_ratio",),
    "contrastive.weight": ("contrastive_weight", "contrastive_flow_matching", "deltafm", "cfm_weight"),
    "noise_assignment": ("immiscible", "immiscible_diffusion", "minibatch_ot", "noise_coupling"),
    "uncertainty": ("learned_uncertainty", "uncertainty_weighting", "loss_uncertainty"),
    "encoder": ("autoencoder", "first_stage", "first_stage_model", "vae_path", "vae_model"),
    "encoder.path": ("pretrained_model_name_or_path", "vae_model_path"),
}

# Names without a key that takes the same value. The sentence says what to write.
SENTENCES: dict[tuple[str, ...], str] = {
    ("epochs", "num_epochs", "max_epochs", "num_train_epochs", "n_epochs", "train_epochs", "total_epochs"): (
        "training is counted in steps: max_training_steps = epochs * images // data.batch_size"
    ),
    ("save_every_n_epochs", "save_model_epochs", "sample_every_n_epochs", "val_every_n_epoch"): (
        "intervals are counted in steps: ckpt_every, log_every, sample_every"
    ),
    ("ema_decay", "ema_rate", "ema_beta", "ema_momentum", "decay"): (
        "ema.halflife_steps = ln 0.5 / ln decay; 6931 is a decay of 0.9999, 693 one of 0.999"
    ),
    ("use_ema", "enable_ema"): "ema.type says which average is kept; none keeps none",
    ("gpus", "num_gpus", "n_gpus", "devices", "num_processes", "nproc_per_node", "world_size"): (
        "the number of processes comes from the launcher: torchrun --nproc-per-node N"
    ),
    ("use_gradient_checkpointing", "gradient_checkpointing", "grad_checkpoint", "grad_checkpointing"): (
        "where a model has it, it is model.gradient_checkpointing"
    ),
    ("lora", "lora_rank", "rank", "network_dim", "use_lora"): "it is lora.rank",
}

# What others call a value, by the value here. It counts where the key takes that value.
OTHER_VALUES: dict[str, tuple[str, ...]] = {
    "cuda": ("gpu", "nvidia", "cuda:0"),
    "cpu": ("mps",),
    "fp32": ("float32", "float", "32", "no", "full", "32-true"),
    "fp16": ("float16", "half", "16", "16-mixed"),
    "bf16": ("bfloat16", "bf16-mixed"),
    "AdamW": ("adam",),
    "cosine": ("cosine_with_warmup", "cosine_annealing", "cosineannealinglr"),
    "constant": ("constant_with_warmup", "none", "fixed"),
    "auto": ("latest", "last", "newest", "yes", "true"),
    "never": ("no", "none", "scratch", "fresh"),
    "epsilon": ("eps", "noise"),
    "x0": ("sample", "x_0", "xstart", "x_start", "x"),
    "v": ("v_prediction", "vpred", "v-prediction"),
    "flow": ("velocity", "flow_prediction", "rectified_flow"),
    "logit_normal": ("lognorm", "logitnormal", "logit-normal"),
    "dpm_solver": ("dpm", "dpm++", "dpmsolver", "dpm-solver", "dpm_solver++", "dpmsolver++"),
    "gemini": ("deepspeed",),
    "fsdp2": ("fsdp", "zero3", "fully_shard"),
    "ddp": ("ddp_find_unused_parameters_true", "distributed"),
    "train": ("training", "fit", "finetune", "fine-tune"),
    "sample": ("grid", "demo"),
    "inference": ("infer", "generate", "generation", "predict"),
    "test": ("eval", "evaluate", "evaluation", "metrics", "val", "validate"),
}
# How alike a misspelt name must be to another trainer's name: "lerning_rate" is learning_rate.
CLOSE_NAME = 0.85


def key_hint(name: str, section: str, known: Collection[str], keys: Sequence[str]) -> str:
    """What follows an unknown key: "; did you mean 'optimizer.lr'?", a sentence, or "".

    Args:
        name: the key as it was written, without its section.
        section: dotted name of its section, "" at the top.
        known: the keys of that section.
        keys: dotted names of all keys.
    """
    plain = _plain(name)
    if plain in _SENTENCE_OF and plain not in known:
        return f"; {_SENTENCE_OF[plain]}"
    close = [join(section, key) for key in difflib.get_close_matches(plain, list(known), n=1)]
    same = [key for key in keys if key.rpartition(".")[2] == plain]
    named = _KEYS_OF.get(plain, [])
    if section:
        found = [key for key in named if key.startswith(f"{section}.")] or close or [*same, *named]
    else:
        found = [*named, *same] or close
    found = list(dict.fromkeys(found))[:2] or _spelled_alike(plain)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def value_hint(value: object, known: Sequence[object]) -> str:
    """ "; did you mean 'AdamW'?" after a value that is none of the known ones, or ""."""
    names = [str(name) for name in known]
    plain = str(value).strip().lower()
    by_case = {name.lower(): name for name in names}
    renamed = {other: name for name in names for other in OTHER_VALUES.get(name, ())}
    found = by_case.get(plain) or renamed.get(plain)
    if found is None:
        close = difflib.get_close_matches(plain, list(by_case), n=1)
        found = by_case[close[0]] if close else None
    return f"; did you mean {found!r}?" if found else ""


def argument_hint(argument: str, before: str) -> str:
    """What follows an argument that is no key=value, or "".

    Args:
        argument: the argument.
        before: the argument before it, "" for the first.
    """
    if argument.endswith((".yaml", ".yml")):
        return "; a run has one config, after -c"
    if before.endswith("=") or re.match(r"\w+(\.\w+)*\s+=|=$", argument):
        return "; wanted no blank on either side of ="
    if re.match(r"[+~-]+\w", argument):
        return "; wanted the key alone, without a sign before it"
    return "; the value follows after =, without a blank" if re.fullmatch(r"\w+(\.\w+)*", argument) else ""


def option_hint(message: str, keys: Sequence[str]) -> str:
    """What follows argparse's message about an option that is a key: how a key is written; or ""."""
    start = "unrecognized arguments: "
    if not message.startswith(start):
        return ""
    option = message.removeprefix(start).split()[0]
    name = option.lstrip("-").partition("=")[0]
    hint = f"; did you mean {name!r}?" if name in keys else key_hint(name, "", [], keys)
    return f"{hint} A key is written without dashes: key=value" if hint else ""


def _spelled_alike(plain: str) -> list[str]:
    """The key that others call by a name that is spelled almost like this one."""
    close = difflib.get_close_matches(plain, list(_KEYS_OF), n=1, cutoff=CLOSE_NAME)
    return _KEYS_OF[close[0]][:1] if close else []


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _inverted(table: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, names in table.items():
        for name in names:
            found.setdefault(name, []).append(key)
    return found


_KEYS_OF = _inverted(OTHER_NAMES)
_SENTENCE_OF = {name: sentence for names, sentence in SENTENCES.items() for name in names}


def join(path: str, name: str) -> str:
    """'a.b' from 'a' and 'b'; 'b' alone at the top level."""
    return f"{path}.{name}" if path else name
