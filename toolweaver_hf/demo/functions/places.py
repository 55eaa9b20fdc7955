"""The small world in which the demo's tools live: a fixed date and a table of cities."""

import datetime
import zlib
from typing import NamedTuple


TODAY = datetime.date(2026, 6, 15)


class City(NamedTuple):
    country: str
    latitude: float
    longitude: float
    utc_offset: float
    currency: str


CITIES = {
    "Amsterdam": City("Netherlands", 52.37, 4.90, 2, "EUR"),
    "Athens": City("Greece", 37.98, 23.73, 3, "EUR"),
    "Berlin": City("Germany", 52.52, 13.41, 2, "EUR"),
    "Boston": City("United States", 42.36, -71.06, -4, "USD"),
    "Cairo": City("Egypt", 30.04, 31.24, 3, "EGP"),
    "Chicago": City("United States", 41.88, -87.63, -5, "USD"),
    "Dublin": City("Ireland", 53.35, -6.26, 1, "EUR"),
    "Helsinki": City("Finland", 60.17, 24.94, 3, "EUR"),
    "Istanbul": City("Turkey", 41.01, 28.98, 3, "TRY"),
    "Kyoto": City("Japan", 35.01, 135.77, 9, "JPY"),
    "Lisbon": City("Portugal", 38.72, -9.14, 1, "EUR"),
    "London": City("United Kingdom", 51.51, -0.13, 1, "GBP"),
    "Madrid": City("Spain", 40.42, -3.70, 2, "EUR"),
    "Mumbai": City("India", 19.08, 72.88, 5.5, "INR"),
    "Nairobi": City("Kenya", -1.29, 36.82, 3, "KES"),
    "Oslo": City("Norway", 59.91, 10.75, 2, "NOK"),
    "Paris": City("France", 48.86, 2.35, 2, "EUR"),
    "Prague": City("Czechia", 50.08, 14.44, 2, "CZK"),
    "Rome": City("Italy", 41.90, 12.50, 2, "EUR"),
    "Santiago": City("Chile", -33.45, -70.67, -4, "CLP"),
    "Seattle": City("United States", 47.61, -122.33, -7, "USD"),
    "Seoul": City("South Korea", 37.57, 126.98, 9, "KRW"),
    "Sydney": City("Australia", -33.87, 151.21, 10, "AUD"),
    "Toronto": City("Canada", 43.65, -79.38, -4, "CAD"),
    "Vienna": City("Austria", 48.21, 16.37, 2, "EUR"),
}


def find_city(name: str) -> City:
    """Return the city called `name`, whatever its capitals; raise a `ValueError` for one that is not in the table."""
    try:
        return CITIES[name.strip().title()]
    except KeyError:
        raise ValueError(f"unknown city {name!r}; known cities: {', '.join(CITIES)}") from None


def draw(*key: object) -> float:
    """Return a number from 0 to 1 that depends on the key alone: the small chances of the demo's world."""
    return zlib.crc32("|".join(map(str, key)).lower().encode()) / 2**32
