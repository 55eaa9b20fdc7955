"""Weather, air and sky over the demo's cities, from simple climate and orbit formulas."""

import datetime
import math

from .places import TODAY, draw, find_city


SKIES = ("clear sky", "scattered clouds", "overcast", "drizzle", "rain", "thunderstorm")


def _temperature(city: str, days: int = 0) -> float:
    """Mean temperature in °C of a day, from latitude, season and a little chance."""
    place = find_city(city)
    day = TODAY.timetuple().tm_yday + days
    season = math.cos(2 * math.pi * (day - 200) / 365) * (1 if place.latitude > 0 else -1)
    return 30 - 0.35 * abs(place.latitude) + 0.2 * abs(place.latitude) * season + 6 * draw("t", city, days) - 3


def _rain_chance(city: str, days: int = 0) -> int:
    return round(100 * draw("rain", city, days) ** 1.5)


def _sun_hours(city: str) -> tuple[float, float]:
    """Sunrise and sunset as hours of the local clock."""
    place = find_city(city)
    tilt = math.radians(23.44) * math.sin(2 * math.pi * (TODAY.timetuple().tm_yday - 80) / 365)
    cosine = -math.tan(math.radians(place.latitude)) * math.tan(tilt)
    half = math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) / 15
    noon = 12 + place.utc_offset - place.longitude / 15
    return noon - half, noon + half


def _clock(hours: float) -> str:
    minutes = round(hours * 60) % 1440
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def current_weather(city: str) -> dict:
    """Report the temperature, the sky and the humidity in a city at this moment.

    Args:
        city: Name of the city.
    """
    chance = _rain_chance(city)
    return {
        "temperature_c": round(_temperature(city) + 2),
        "sky": SKIES[min(5, chance // 17)],
        "humidity": 40 + chance // 2,
    }


def weather_forecast(city: str, days: int = 1) -> dict:
    """Forecast the highest and lowest temperature and the sky of a coming day in a city.

    Args:
        city: Name of the city.
        days: How many days ahead, from 1 to 10.
    """
    if not 1 <= days <= 10:
        raise ValueError(f"a forecast reaches 1 to 10 days ahead, not {days}")
    mean = _temperature(city, days)
    return {"high_c": round(mean + 5), "low_c": round(mean - 5), "sky": SKIES[min(5, _rain_chance(city, days) // 17)]}


def rain_chance(city: str, days: int = 0) -> dict:
    """Give the probability of precipitation in a city on a day and the hour at which rain is likeliest.

    Args:
        city: Name of the city.
        days: How many days ahead; 0 is today.
    """
    chance = _rain_chance(city, days)
    return {"chance_percent": chance, "likeliest_hour": f"{round(23 * draw('hour', city, days)):02d}:00"}


def wind_report(city: str) -> dict:
    """Measure wind speed, gusts and direction in a city.

    Args:
        city: Name of the city.
    """
    speed = round(4 + 40 * draw("wind", city) ** 2)
    compass = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
    return {"speed_kmh": speed, "gusts_kmh": round(speed * 1.6), "direction": compass[int(8 * draw("from", city))]}


def uv_index(city: str) -> dict:
    """Look up the ultraviolet index in a city and the protection factor that skin needs.

    Args:
        city: Name of the city.
    """
    index = round(12 * math.cos(math.radians(abs(find_city(city).latitude - 23))) ** 2)
    return {"uv_index": index, "sun_protection_factor": 15 if index < 3 else 30 if index < 7 else 50}


def snow_report(resort: str) -> dict:
    """Report snow depth and open slopes of a ski resort.

    Args:
        resort: Name of the ski resort.
    """
    depth = round(180 * draw("snow", resort))
    return {"depth_cm": depth, "open_slopes": depth // 6}


def storm_warning(city: str) -> dict:
    """List official severe weather alerts, such as storms, floods and heat, that are in force for a city.

    Args:
        city: Name of the city.
    """
    find_city(city)
    level = ("none", "none", "yellow", "orange", "red")[int(5 * draw("alert", city))]
    kind = ("storm", "flood", "heat", "hail")[int(4 * draw("kind", city))] if level != "none" else "none"
    return {"level": level, "kind": kind}


def air_quality(city: str) -> dict:
    """Measure the air quality index and the main pollutant in a city.

    Args:
        city: Name of the city.
    """
    find_city(city)
    index = round(15 + 130 * draw("aqi", city))
    level = "good" if index <= 50 else "moderate" if index <= 100 else "unhealthy"
    return {"aqi": index, "level": level, "pollutant": ("PM2.5", "ozone", "NO2")[int(3 * draw("pm", city))]}


def pollen_count(city: str, plant: str = "grass") -> dict:
    """Give the pollen level of a plant in a city, for people with hay fever.

    Args:
        city: Name of the city.
        plant: Kind of pollen. (choices: ["grass", "birch", "ragweed"])
    """
    find_city(city)
    grains = round(120 * draw("pollen", city, plant))
    return {"grains": grains, "level": "low" if grains < 30 else "medium" if grains < 80 else "high"}


def water_quality(beach: str) -> dict:
    """Tell whether the water at a beach or lake is clean enough for bathing, with its temperature.

    Args:
        beach: Name of the beach or lake.
    """
    grade = ("excellent", "good", "sufficient", "poor")[int(4 * draw("water", beach))]
    return {"grade": grade, "water_c": round(16 + 10 * draw("warm", beach))}


def noise_level(street: str) -> dict:
    """Measure how loud a street is by day and by night, in decibels.

    Args:
        street: Name of the street or square.
    """
    day = round(48 + 30 * draw("noise", street))
    return {"day_db": day, "night_db": day - 9}


def wildfire_smoke(region: str) -> dict:
    """Track active wildfires in a region and how dense their smoke is.

    Args:
        region: Name of the region.
    """
    fires = round(9 * draw("fires", region))
    return {"active_fires": fires, "smoke": "none" if fires < 2 else "light" if fires < 6 else "dense"}


def sunrise_sunset(city: str) -> dict:
    """Compute the local times of sunrise and sunset in a city.

    Args:
        city: Name of the city.
    """
    rise, down = _sun_hours(city)
    return {"sunrise": _clock(rise), "sunset": _clock(down)}


def day_length(city: str) -> dict:
    """Compute how many hours of daylight a city has.

    Args:
        city: Name of the city.
    """
    rise, down = _sun_hours(city)
    return {"hours": round(down - rise, 1)}


def moon_phase(days: int = 0) -> dict:
    """Compute the phase of the moon and how much of it is lit.

    Args:
        days: How many days ahead; 0 is tonight.
    """
    age = ((TODAY - datetime.date(2000, 1, 6)).days + days) % 29.53
    phases = ["new moon", "waxing crescent", "first quarter", "waxing gibbous"]
    phases += ["full moon", "waning gibbous", "last quarter", "waning crescent"]
    lit = round(50 * (1 - math.cos(2 * math.pi * age / 29.53)))
    return {"phase": phases[round(age / 29.53 * 8) % 8], "lit_percent": lit}


def tide_times(harbour: str) -> dict:
    """Give the times of high and low tide at a harbour.

    Args:
        harbour: Name of the harbour or coast.
    """
    high = 12.4 * draw("tide", harbour)
    return {
        "high_tide": _clock(high),
        "low_tide": _clock(high + 6.2),
        "range_m": round(1 + 5 * draw("range", harbour), 1),
    }


def aurora_forecast(city: str) -> dict:
    """Predict whether northern lights will be visible from a city.

    Args:
        city: Name of the city.
    """
    strength = round(9 * draw("aurora", city))
    seen = strength >= 12 - find_city(city).latitude / 8
    return {"kp_index": strength, "visible": seen}


def earthquake_feed(region: str) -> dict:
    """Report the latest earthquake in a region with its magnitude and depth.

    Args:
        region: Name of the region.
    """
    return {
        "magnitude": round(2 + 4 * draw("quake", region), 1),
        "depth_km": round(5 + 60 * draw("depth", region)),
        "hours_ago": round(1 + 70 * draw("ago", region)),
    }


def stargazing_conditions(city: str) -> dict:
    """Rate the night sky over a city for watching stars, by cloud cover and light pollution.

    Args:
        city: Name of the city.
    """
    clouds = _rain_chance(city)
    glow = round(3 + 6 * draw("glow", city))
    return {"cloud_percent": clouds, "light_pollution": glow, "good": clouds < 40 and glow < 7}


def climate_average(city: str, month: int) -> dict:
    """Give the long-term average temperature and number of rainy days of a city in a month.

    Args:
        city: Name of the city.
        month: Month of the year, from 1 to 12.
    """
    if not 1 <= month <= 12:
        raise ValueError(f"a month is a number from 1 to 12, not {month}")
    mean = _temperature(city, 30 * (month - TODAY.month))
    return {"mean_c": round(mean), "rainy_days": round(3 + 14 * draw("wet", city, month))}
