"""One call that makes a pipeline faster, of parts that each state their loss contract."""

from fastgen.pipelines.accelerate.plan import Plan, Row
from fastgen.pipelines.accelerate.switch import accelerate, accelerated, restore

__all__ = ["Plan", "Row", "accelerate", "accelerated", "restore"]
