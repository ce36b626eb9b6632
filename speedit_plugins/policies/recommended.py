"""The policy that a training gets if none is named. A config is checked without torch, so this needs none."""

# In a config, the name of the policy that `recommended` says.
RECOMMENDED = "recommended"


def recommended(prediction_type: str) -> str:
    """The policy to take if nothing else is asked for: the published `speedit` for epsilon, `auto` else.

    Example:
        >>> recommended("flow"), recommended("epsilon")
        ('auto', 'speedit')
    """
    return "speedit" if prediction_type == "epsilon" else "auto"
