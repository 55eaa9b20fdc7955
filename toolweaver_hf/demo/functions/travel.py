"""Getting about: flights, trains, hotels and city transport, from distances between the demo's cities."""

import math

from .places import draw, find_city


def _distance(origin: str, destination: str) -> float:
    """Great-circle distance in kilometres."""
    a, b = find_city(origin), find_city(destination)
    lat_a, lat_b = math.radians(a.latitude), math.radians(b.latitude)
    turn = math.radians(b.longitude - a.longitude)
    cosine = math.sin(lat_a) * math.sin(lat_b) + math.cos(lat_a) * math.cos(lat_b) * math.cos(turn)
    return 6371 * math.acos(max(-1.0, min(1.0, cosine)))


def search_flights(origin: str, destination: str) -> dict:
    """Search the cheapest flight between two cities, with its price and airline.

    Args:
        origin: City of departure.
        destination: City of arrival.
    """
    price = 40 + 0.09 * _distance(origin, destination) * (0.7 + 0.6 * draw("fare", origin, destination))
    airline = ("Blue Wing", "Nordic Air", "Sunline", "Skyway")[int(4 * draw("air", origin, destination))]
    return {"price_eur": round(price), "airline": airline, "departure": f"{6 + int(15 * draw('dep', origin)):02d}:25"}


def flight_duration(origin: str, destination: str) -> dict:
    """Estimate how long a direct flight between two cities takes, and the distance.

    Args:
        origin: City of departure.
        destination: City of arrival.
    """
    distance = _distance(origin, destination)
    return {"hours": round(distance / 830 + 0.5, 1), "distance_km": round(distance)}


def flight_status(flight: str) -> dict:
    """Tell whether a flight is on time, its delay and its gate.

    Args:
        flight: Flight number, such as BW204.
    """
    delay = max(0, round(90 * draw("delay", flight) - 45))
    return {
        "status": "delayed" if delay else "on time",
        "delay_minutes": delay,
        "gate": f"B{1 + int(30 * draw(flight))}",
    }


def search_trains(origin: str, destination: str) -> dict:
    """Find the next train connection between two cities with departure, changes and price.

    Args:
        origin: City of departure.
        destination: City of arrival.
    """
    distance = _distance(origin, destination)
    return {
        "departure": f"{6 + int(14 * draw('train', origin, destination)):02d}:40",
        "hours": round(distance / 150 + 0.4, 1),
        "changes": int(distance // 500),
        "price_eur": round(12 + 0.11 * distance),
    }


def search_hotels(city: str, nights: int = 1) -> dict:
    """Find a hotel room in a city with its price for the whole stay and its rating.

    Args:
        city: Name of the city.
        nights: Number of nights.
    """
    find_city(city)
    hotel = ("Hotel Aurora", "The Old Mill", "Park Inn", "Harbour House")[int(4 * draw("hotel", city))]
    price = round((60 + 120 * draw("room", city)) * nights)
    return {"hotel": hotel, "price_eur": price, "stars": 2 + int(3 * draw("stars", city))}


def visa_requirement(nationality: str, country: str) -> dict:
    """Tell whether citizens of one country need a visa to enter another, and for how long they may stay.

    Args:
        nationality: Country of the passport.
        country: Country to be visited.
    """
    needed = draw("visa", nationality, country) > 0.6
    return {"visa_needed": needed, "days_allowed": 30 if needed else 90}


def baggage_allowance(airline: str, cabin: str = "economy") -> dict:
    """Give the weight and size of luggage that an airline lets passengers take.

    Args:
        airline: Name of the airline.
        cabin: Class of travel. (choices: ["economy", "business"])
    """
    extra = 9 if cabin == "business" else 0
    return {"checked_kg": 23 + extra, "hand_kg": 7 + int(4 * draw("bag", airline)), "pieces": 1 + (extra > 0)}


def jet_lag_plan(origin: str, destination: str) -> dict:
    """Plan how to shift sleep before a long journey across time zones.

    Args:
        origin: City of departure.
        destination: City of arrival.
    """
    shift = find_city(destination).utc_offset - find_city(origin).utc_offset
    direction = "earlier" if shift > 0 else "later"
    return {"shift_hours": abs(shift), "go_to_bed": direction, "days_to_adapt": math.ceil(abs(shift) * 0.7)}


def packing_list(destination: str, purpose: str = "holiday") -> dict:
    """Suggest what to pack for a journey.

    Args:
        destination: City of arrival.
        purpose: Kind of journey. (choices: ["holiday", "business", "hiking"])
    """
    items = {"holiday": ["swimwear", "sunglasses"], "business": ["suit", "laptop"], "hiking": ["boots", "rain jacket"]}
    warm = abs(find_city(destination).latitude) < 42
    return {"items": [*items[purpose], "light shirts" if warm else "a sweater", "charger"]}


def airport_transfer(city: str) -> dict:
    """Tell how to get from the airport into the center of a city, with time and price.

    Args:
        city: Name of the city.
    """
    find_city(city)
    way = ("train", "express bus", "metro")[int(3 * draw("transfer", city))]
    return {"by": way, "minutes": 18 + int(40 * draw("minutes", city)), "price_eur": 4 + int(14 * draw("eur", city))}


def travel_insurance(destination: str, days: int) -> dict:
    """Quote travel insurance for a journey, with medical cover and cancellation.

    Args:
        destination: City of arrival.
        days: Length of the journey in days.
    """
    find_city(destination)
    return {"price_eur": round(8 + 2.4 * days), "medical_cover_eur": 1000000, "cancellation": days >= 5}


def sightseeing(city: str) -> dict:
    """Recommend sights and attractions in a city, with opening hours.

    Args:
        city: Name of the city.
    """
    find_city(city)
    sights = ("the old town", "the national museum", "the castle", "the botanical garden", "the cathedral")
    first = int(5 * draw("sight", city))
    return {"sights": [sights[first], sights[(first + 2) % 5]], "open": "10:00-18:00"}


def find_park(city: str) -> dict:
    """Find a public park or green space in a city, with its size and facilities.

    Args:
        city: Name of the city.
    """
    find_city(city)
    park = ("Willow Park", "Hill Gardens", "Riverside Meadow", "Lindenwood")[int(4 * draw("park", city))]
    return {"park": park, "hectares": 5 + int(80 * draw("size", city)), "playground": draw("swing", city) > 0.3}


def hiking_trail(region: str) -> dict:
    """Describe a hiking trail in a region: its length, climb and difficulty.

    Args:
        region: Name of the region or mountain range.
    """
    length, climb = round(5 + 15 * draw("km", region), 1), round(100 + 1100 * draw("climb", region))
    return {"length_km": length, "climb_m": climb, "difficulty": "hard" if climb > 700 else "moderate"}


def campsite_booking(region: str, nights: int) -> dict:
    """Book a pitch for a tent or camper van on a campsite.

    Args:
        region: Name of the region.
        nights: Number of nights.
    """
    return {"campsite": f"Camping {region}", "pitch": 1 + int(90 * draw("pitch", region)), "price_eur": 24 * nights}


def plan_route(origin: str, destination: str) -> dict:
    """Plan a drive by car between two cities, with distance, time and fuel cost.

    Args:
        origin: Where the drive starts.
        destination: Where it ends.
    """
    distance = 1.25 * _distance(origin, destination)
    return {"distance_km": round(distance), "hours": round(distance / 95, 1), "fuel_eur": round(distance * 0.11)}


def public_transport_fare(city: str, zone: int = 1) -> dict:
    """Tell what a bus, tram or metro ticket costs in a city.

    Args:
        city: Name of the city.
        zone: Number of fare zones, from 1 to 5.
    """
    find_city(city)
    single = round(1.4 + 1.5 * draw("ticket", city) + 0.8 * (zone - 1), 2)
    return {"single_eur": single, "day_pass_eur": round(single * 3, 2)}


def bike_share(station: str) -> dict:
    """Count the bicycles and free docks at a bike sharing station.

    Args:
        station: Name of the station or square.
    """
    bikes = int(20 * draw("bikes", station))
    return {"bikes": bikes, "docks": 20 - bikes}


def find_parking(place: str) -> dict:
    """Find a car park near a place, with free spaces and the price for an hour.

    Args:
        place: Name of the place.
    """
    return {
        "garage": f"{place} Garage",
        "spaces": int(200 * draw("spaces", place)),
        "eur_per_hour": 1 + int(4 * draw(place)),
    }


def ev_charging(place: str) -> dict:
    """Find a free charging point for an electric car near a place.

    Args:
        place: Name of the place.
    """
    power = (11, 22, 50, 150)[int(4 * draw("kw", place))]
    return {"free_points": int(8 * draw("points", place)), "power_kw": power, "minutes_to_80": round(2400 / power)}
