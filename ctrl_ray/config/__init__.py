"""Every setting of a run, as frozen dataclasses: what it means and what it costs. No torch, no ray here."""

from ctrl_ray.config.control import ClassifierConfig, ControlConfig
from ctrl_ray.config.evaluation import EvaluationConfig
from ctrl_ray.config.method import MethodConfig, MethodName
from ctrl_ray.config.policy import AdapterConfig, AdapterKind, FlowSDE, LoraConfig, NullBranch, SamplerConfig
from ctrl_ray.config.resources import RewardPoolConfig, ScalingConfig
from ctrl_ray.config.run import TrainConfig
from ctrl_ray.config.training import EstimatorConfig, OptimizerConfig, TrainingMethod
from ctrl_ray.config.values import Auto, Precision

__all__ = [
    "AdapterConfig",
    "AdapterKind",
    "Auto",
    "ClassifierConfig",
    "ControlConfig",
    "EstimatorConfig",
    "EvaluationConfig",
    "FlowSDE",
    "LoraConfig",
    "MethodConfig",
    "MethodName",
    "NullBranch",
    "OptimizerConfig",
    "Precision",
    "RewardPoolConfig",
    "SamplerConfig",
    "ScalingConfig",
    "TrainConfig",
    "TrainingMethod",
]
