"""Mathematics, statistics and units."""

import math
import statistics


LENGTHS = {"m": 1.0, "km": 1000.0, "cm": 0.01, "mile": 1609.344, "foot": 0.3048, "inch": 0.0254, "yard": 0.9144}
WEIGHTS = {"kg": 1.0, "g": 0.001, "pound": 0.45359237, "ounce": 0.028349523, "stone": 6.35029318, "tonne": 1000.0}
VOLUMES = {"l": 1.0, "ml": 0.001, "cup": 0.2366, "gallon": 3.785, "pint": 0.4732, "tablespoon": 0.01479}
SPEEDS = {"km/h": 1.0, "mph": 1.609344, "knots": 1.852, "m/s": 3.6}


def _convert(value: float, source: str, target: str, table: dict[str, float]) -> dict:
    for unit in (source, target):
        if unit not in table:
            raise ValueError(f"unknown unit {unit!r}; known: {', '.join(table)}")
    return {"value": round(value * table[source] / table[target], 3), "unit": target}


def convert_length(value: float, source: str, target: str) -> dict:
    """Convert a length or distance between metric and imperial units.

    Args:
        value: The length.
        source: Unit it is in. (choices: ["m", "km", "cm", "mile", "foot", "inch", "yard"])
        target: Unit wanted. (choices: ["m", "km", "cm", "mile", "foot", "inch", "yard"])
    """
    return _convert(value, source, target, LENGTHS)


def convert_weight(value: float, source: str, target: str) -> dict:
    """Convert a weight between kilograms, pounds, ounces and others.

    Args:
        value: The weight.
        source: Unit it is in. (choices: ["kg", "g", "pound", "ounce", "stone", "tonne"])
        target: Unit wanted. (choices: ["kg", "g", "pound", "ounce", "stone", "tonne"])
    """
    return _convert(value, source, target, WEIGHTS)


def convert_volume(value: float, source: str, target: str) -> dict:
    """Convert a volume, such as cups and gallons, between kitchen and metric units.

    Args:
        value: The volume.
        source: Unit it is in. (choices: ["l", "ml", "cup", "gallon", "pint", "tablespoon"])
        target: Unit wanted. (choices: ["l", "ml", "cup", "gallon", "pint", "tablespoon"])
    """
    return _convert(value, source, target, VOLUMES)


def convert_speed(value: float, source: str, target: str) -> dict:
    """Convert a speed between km/h, mph, knots and m/s.

    Args:
        value: The speed.
        source: Unit it is in. (choices: ["km/h", "mph", "knots", "m/s"])
        target: Unit wanted. (choices: ["km/h", "mph", "knots", "m/s"])
    """
    return _convert(value, source, target, SPEEDS)


def convert_temperature(value: float, target: str) -> dict:
    """Convert degrees between Celsius and Fahrenheit.

    Args:
        value: The temperature in the other scale.
        target: Scale wanted. (choices: ["celsius", "fahrenheit"])
    """
    return {"degrees": round((value - 32) / 1.8 if target == "celsius" else value * 1.8 + 32, 1), "scale": target}


def shoe_size(size: float, target: str) -> dict:
    """Convert a European shoe size to British or American sizes.

    Args:
        size: European size.
        target: System wanted. (choices: ["UK", "US"])
    """
    if not 15 <= size <= 52:
        raise ValueError("European shoe sizes lie between 15 and 52")
    return {"size": size - 33 + (target == "US"), "system": target}


def average(numbers: list[float]) -> dict:
    """Compute mean and median of some numbers.

    Args:
        numbers: The numbers.
    """
    return {"mean": round(statistics.fmean(numbers), 3), "median": statistics.median(numbers)}


def standard_deviation(numbers: list[float]) -> dict:
    """Compute how far numbers spread around their mean: variance and standard deviation.

    Args:
        numbers: The numbers.
    """
    return {"deviation": round(statistics.pstdev(numbers), 3), "variance": round(statistics.pvariance(numbers), 3)}


def percentage(part: float, whole: float) -> dict:
    """Compute what share one number is of another, in percent.

    Args:
        part: The part.
        whole: The whole.
    """
    if whole == 0:
        raise ValueError("the whole must not be zero")
    return {"percent": round(100 * part / whole, 2)}


def percent_change(old: float, new: float) -> dict:
    """Compute the growth or decline from one number to another, in percent.

    Args:
        old: The number before.
        new: The number after.
    """
    if old == 0:
        raise ValueError("the number before must not be zero")
    return {"percent": round(100 * (new - old) / old, 2)}


def solve_quadratic(a: float, b: float, c: float) -> dict:
    """Solve the equation a x² + b x + c = 0.

    Args:
        a: Factor of x².
        b: Factor of x.
        c: The constant.
    """
    root = b * b - 4 * a * c
    if a == 0 or root < 0:
        raise ValueError("the equation has no two real solutions")
    return {"x1": round((-b + math.sqrt(root)) / (2 * a), 3), "x2": round((-b - math.sqrt(root)) / (2 * a), 3)}


def prime_factors(number: int) -> dict:
    """Split a whole number into its prime factors, or tell that it is prime.

    Args:
        number: A whole number above 1.
    """
    if not 1 < number < 10**9:
        raise ValueError("the number must lie between 2 and a thousand million")
    factors, rest, divisor = [], number, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        divisor += 1
    if rest > 1:
        factors.append(rest)
    return {"factors": factors, "is_prime": len(factors) == 1}


def common_divisor(first: int, second: int) -> dict:
    """Compute the greatest common divisor and the least common multiple of two numbers.

    Args:
        first: One number.
        second: The other number.
    """
    return {"divisor": math.gcd(first, second), "multiple": math.lcm(first, second)}


def roman_numeral(number: int) -> dict:
    """Write a number in Roman numerals.

    Args:
        number: From 1 to 3999.
    """
    if not 0 < number < 4000:
        raise ValueError("Roman numerals reach from 1 to 3999")
    signs = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")]
    text = ""
    for value, sign in [*signs, (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]:
        text += sign * (number // value)
        number %= value
    return {"roman": text}


def number_base(number: int, base: str) -> dict:
    """Write a decimal number in binary, octal or hexadecimal.

    Args:
        number: The decimal number.
        base: Base wanted. (choices: ["binary", "octal", "hexadecimal"])
    """
    return {"digits": format(number, {"binary": "b", "octal": "o", "hexadecimal": "x"}[base]), "base": base}


def circle_area(radius: float) -> dict:
    """Compute area and circumference of a circle.

    Args:
        radius: The radius.
    """
    return {"area": round(math.pi * radius**2, 2), "circumference": round(2 * math.pi * radius, 2)}


def triangle_side(a: float, b: float) -> dict:
    """Compute the longest side of a right triangle by Pythagoras.

    Args:
        a: One short side.
        b: The other short side.
    """
    return {"side": round(math.hypot(a, b), 3)}


def dice_odds(dice: int, total: int) -> dict:
    """Compute the probability that some dice show a total.

    Args:
        dice: Number of dice, from 1 to 6.
        total: The sum that they are to show.
    """
    ways = {0: 1}
    for _ in range(dice):
        ways = {s: sum(ways.get(s - face, 0) for face in range(1, 7)) for s in range(1, 6 * dice + 1)}
    return {"percent": round(100 * ways.get(total, 0) / 6**dice, 2)}


def compound_growth(start: float, rate: float, periods: int) -> dict:
    """Compute what a quantity grows to at a fixed rate for a number of periods.

    Args:
        start: The quantity at the start.
        rate: Growth of a period in percent.
        periods: Number of periods.
    """
    return {"end": round(start * (1 + rate / 100) ** periods, 2), "factor": round((1 + rate / 100) ** periods, 3)}


def linear_trend(numbers: list[float]) -> dict:
    """Fit a straight line through a series of numbers and predict the next one.

    Args:
        numbers: The series, at least two numbers.
    """
    fit = statistics.linear_regression(range(len(numbers)), numbers)
    return {"slope": round(fit.slope, 3), "next": round(fit.intercept + fit.slope * len(numbers), 2)}
