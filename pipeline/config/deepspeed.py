"""Names of the `training.deepspeed` block, checked without importing DeepSpeed.

DeepSpeed ignores top-level keys that it does not know. It refuses other wrong keys only when the
workers start, after all teachers were asked. The names in this module are the names of the locked
version, and a test compares them with the installed one. `students/deepspeed_options.py` checks the
values.
"""

from __future__ import annotations

from typing import Any

from pipeline.messages import closest

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.sequences_per_step sets the batch",
    "train_micro_batch_size_per_gpu": "training.tokens_per_micro_batch sets the micro-batch",
    "gradient_accumulation_steps": (
        "training.tokens_per_micro_batch sets the micro-batches, so polystill accumulates gradients"
    ),
    "managed_gradient_accumulation": (
        "training.tokens_per_micro_batch sets the micro-batches, so polystill accumulates gradients"
    ),
    "scheduler": "training.warmup_steps and training.min_learning_rate_ratio set the schedule",
    "optimizer": "training.learning_rate, betas and weight_decay set AdamW",
    "gradient_clipping": "training.gradient_clipping sets it",
    "bf16": "student.dtype sets it",
    "bfloat16": "student.dtype sets it",
    "fp16": "student.dtype sets the number format, float32 or bfloat16",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL = _names("""
    activation_checkpointing aio autotuning checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types
    dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state
    expert_parallel flops_profiler gradient_allreduce_op gradient_predivide_factor
    hybrid_engine log_level memory_breakdown pipeline prescale_gradients
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown
    wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
""")
ZERO_OPTIMIZATION = _names("""
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm
    contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory
    elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save
    ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param
    overlap_comm override_module_apply param_persistence_threshold parameter_alignment
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter
    round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
    stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights
    zero_quantized_weights
""")
OFFLOAD_PARAM = _names("buffer_count buffer_size device max_in_cpu nvme_path pin_memory")
OFFLOAD_OPTIMIZER = _names("""
    buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read
    pipeline_write ratio super_offload
""")


def check_deepspeed(block: dict[str, Any]) -> None:
    """Checks the names of a `deepspeed` block and of its ZeRO options, and the stage of ZeRO.

    Raises:
        ValueError: another field of the config sets a key, a key is unknown (the closest known key
            is named), or a value is no mapping.
    """
    for key, reason in OWNED_DEEPSPEED_KEYS.items():
        if key in block:
            raise ValueError(f"deepspeed.{key} is not accepted: {reason}")
    _check_names("deepspeed", block, TOP_LEVEL)
    if "load_universal" in _mapping("deepspeed", block, "checkpoint"):
        raise ValueError(
            "deepspeed.checkpoint.load_universal is not accepted: a resumed training sets it "
            "itself if the number of workers or ZeRO's stage has changed; leave it out"
        )
    zero = _mapping("deepspeed", block, "zero_optimization")
    place = "deepspeed.zero_optimization"
    _check_names(place, zero, ZERO_OPTIMIZATION)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        raise ValueError(f"{place}.stage must be 0, 1, 2 or 3, found {stage!r}")
    for key, known in (
        ("offload_param", OFFLOAD_PARAM),
        ("offload_optimizer", OFFLOAD_OPTIMIZER),
    ):
        if zero.get(key) is not None:
            _check_names(f"{place}.{key}", _mapping(place, zero, key), known)


def _mapping(place: str, block: dict[str, Any], key: str) -> dict[str, Any]:
    value = block.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{place}.{key} must be a mapping, found {value!r}")
    return value


def _check_names(place: str, block: dict[str, Any], known: frozenset[str]) -> None:
    for key in block:
        if key not in known:
            raise ValueError(f"{place}.{key} is unknown to DeepSpeed; {closest(str(key), known)}")
