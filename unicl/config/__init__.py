"""Frozen dataclasses, TOML recipes of what differs, strict loading. Imports no torch."""

from unicl.config.loading import load_recipe as load_recipe
from unicl.config.loading import override_section as override_section
from unicl.config.loading import parse_recipe as parse_recipe
from unicl.config.loading import recipe_names as recipe_names
from unicl.config.loading import recipe_to_toml as recipe_to_toml
from unicl.config.plugins import PRETRAINING as PRETRAINING
from unicl.config.plugins import Plugin as Plugin
from unicl.config.plugins import evaluation_names as evaluation_names
from unicl.config.plugins import find_holder as find_holder
from unicl.config.plugins import find_picture as find_picture
from unicl.config.plugins import find_plugin as find_plugin
from unicl.config.plugins import plugin_names as plugin_names
from unicl.config.plugins import split_evaluation as split_evaluation
from unicl.config.schema import DataConfig as DataConfig
from unicl.config.schema import EngineConfig as EngineConfig
from unicl.config.schema import EvaluationConfig as EvaluationConfig
from unicl.config.schema import ImageTowerConfig as ImageTowerConfig
from unicl.config.schema import LossConfig as LossConfig
from unicl.config.schema import OptimizerConfig as OptimizerConfig
from unicl.config.schema import Recipe as Recipe
from unicl.config.schema import ScheduleConfig as ScheduleConfig
from unicl.config.schema import TextTowerConfig as TextTowerConfig
from unicl.config.schema import TrainerConfig as TrainerConfig
from unicl.config.schema import require_unset as require_unset
