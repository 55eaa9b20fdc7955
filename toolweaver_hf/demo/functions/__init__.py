"""The functions behind the demo's tools: pure, deterministic and local."""

import inspect

from . import culture, developer, health, household, messages, money, numbers_and_units, office, travel, weather


FUNCTIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in (culture, developer, health, household, messages, money, numbers_and_units, office, travel, weather)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
"""The demo's functions by `module.function`, the name that a tool's `metadata["function"]` gives."""
