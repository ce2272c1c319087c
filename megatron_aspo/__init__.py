"""Reinforcement-learning training of language models on Megatron-Core, vLLM and Ray.

Importing the package imports nothing heavy; each room (`losses`, `trainer`, `rollout`, …) is imported where it is used.
"""

__version__ = "0.1.0"
