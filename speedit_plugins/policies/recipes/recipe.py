"""What a named policy is: a function that returns a config of parts.

A recipe has a density, a weighting, and perhaps a draw, a scope, and the options of every policy.
`build_policy("speed", schedule)` and `build_policy(speed(), schedule)` are the same policy. A config may
override what a recipe gives.
"""

from typing import Any

Recipe = dict[str, Any]
