"""What a run will need, foretold without a GPU and without data (Florence, section 2.7)."""

from unicl.plan.planner import Plan as Plan
from unicl.plan.planner import plan as plan
