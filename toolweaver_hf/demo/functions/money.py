"""Bank, shopping, taxes and markets, over small fixed tables."""

import datetime

from .places import TODAY, draw


ACCOUNTS = {"checking": 1843.20, "savings": 9120.55, "credit card": -312.40}
RATES = {
    "EUR": 1.0,
    "USD": 1.08,
    "GBP": 0.85,
    "JPY": 169.0,
    "INR": 90.2,
    "CAD": 1.47,
    "AUD": 1.63,
    "NOK": 11.6,
    "TRY": 35.1,
}
TRANSACTIONS = ["rent -820.00", "grocer -54.10", "salary +2650.00", "gym -29.90"]


def _rate(currency: str) -> float:
    try:
        return RATES[currency.upper()]
    except KeyError:
        raise ValueError(f"unknown currency {currency!r}; known: {', '.join(RATES)}") from None


def _amount(value: float) -> float:
    if value <= 0:
        raise ValueError("the amount must be above zero")
    return value


def account_balance(account: str = "checking") -> dict:
    """Show how much money is in a bank account.

    Args:
        account: Which account. (choices: ["checking", "savings", "credit card"])
    """
    return {"balance_eur": ACCOUNTS[account]}


def recent_transactions(account: str = "checking") -> dict:
    """List the latest bookings on a bank account.

    Args:
        account: Which account. (choices: ["checking", "savings", "credit card"])
    """
    return {"transactions": TRANSACTIONS[: 4 if account == "checking" else 1]}


def transfer_money(recipient: str, amount: float) -> dict:
    """Send money from my bank account to somebody.

    Args:
        recipient: Who receives the money.
        amount: Amount in euros.
    """
    return {"sent_eur": _amount(amount), "to": recipient, "balance_eur": round(ACCOUNTS["checking"] - amount, 2)}


def split_bill(total: float, people: int) -> dict:
    """Divide a restaurant bill evenly among friends.

    Args:
        total: Sum of the bill.
        people: How many people share it.
    """
    return {"each": round(_amount(total) / people, 2)}


def calculate_tip(total: float, percent: float = 10) -> dict:
    """Compute the gratuity for a waiter or driver.

    Args:
        total: Sum of the bill.
        percent: Share of the bill in percent.
    """
    tip = round(_amount(total) * percent / 100, 2)
    return {"tip": tip, "total": round(total + tip, 2)}


def savings_plan(monthly: float, years: int, rate: float = 3) -> dict:
    """Project how much regular saving grows to with interest.

    Args:
        monthly: Amount put aside each month.
        years: Number of years.
        rate: Interest a year in percent.
    """
    growth = 1 + rate / 1200
    value = _amount(monthly) * years * 12 if rate == 0 else monthly * (growth ** (12 * years) - 1) / (growth - 1)
    return {"value": round(value), "paid_in": round(monthly * 12 * years)}


def budget_check(category: str) -> dict:
    """Tell how much of this month's budget for a kind of spending is used up.

    Args:
        category: Kind of spending, such as groceries or clothes.
    """
    limit = 100 + 50 * int(8 * draw("limit", category))
    spent = round(limit * 1.2 * draw("spent", category))
    return {"limit_eur": limit, "spent_eur": spent, "left_eur": limit - spent}


def list_subscriptions() -> dict:
    """List the recurring payments, such as streaming services and memberships, with their monthly cost."""
    return {"subscriptions": ["film club 12.99", "news 9.50", "gym 29.90"], "monthly_eur": 52.39}


def convert_currency(amount: float, source: str, target: str) -> dict:
    """Convert an amount of money from one currency to another.

    Args:
        amount: The amount.
        source: Code of the currency it is in, such as EUR.
        target: Code of the currency wanted, such as USD.
    """
    return {"amount": round(_amount(amount) / _rate(source) * _rate(target), 2), "currency": target.upper()}


def stock_quote(company: str) -> dict:
    """Look up the share price of a company and how it moved today.

    Args:
        company: Name of the company.
    """
    return {
        "price_usd": round(20 + 400 * draw("stock", company), 2),
        "change_percent": round(8 * draw("move", company) - 4, 1),
    }


def crypto_price(coin: str) -> dict:
    """Look up what a cryptocurrency is worth.

    Args:
        coin: Name of the coin.
    """
    return {
        "price_usd": round(10 ** (5 * draw("coin", coin)), 2),
        "change_percent": round(20 * draw("c", coin) - 10, 1),
    }


def mortgage_payment(price: float, years: int, rate: float = 3.5) -> dict:
    """Compute the monthly instalment of a home loan.

    Args:
        price: Amount borrowed.
        years: Number of years.
        rate: Interest a year in percent.
    """
    month = rate / 1200
    payment = _amount(price) * month / (1 - (1 + month) ** (-12 * years))
    return {"monthly": round(payment, 2), "interest_total": round(payment * 12 * years - price)}


def income_tax(income: float, country: str) -> dict:
    """Estimate the income tax on a yearly salary.

    Args:
        income: Salary of a year.
        country: Country where the tax is paid.
    """
    rate = 18 + int(20 * draw("tax", country))
    return {"tax": round(_amount(income) * rate / 100), "rate_percent": rate}


def sales_tax(price: float, rate: float = 20) -> dict:
    """Add value added tax to a net price.

    Args:
        price: Net price.
        rate: Tax rate in percent.
    """
    return {"gross": round(_amount(price) * (1 + rate / 100), 2), "tax": round(price * rate / 100, 2)}


def inflation_adjust(amount: float, year: int) -> dict:
    """Tell what a sum of money from an earlier year would be worth today.

    Args:
        amount: The sum.
        year: The earlier year.
    """
    return {"today": round(_amount(amount) * 1.028 ** (TODAY.year - year), 2)}


def product_search(product: str) -> dict:
    """Search online shops for a product and its best price.

    Args:
        product: What to buy.
    """
    shop = ("Brightmart", "Corner & Co", "Depot 7")[int(3 * draw("shop", product))]
    return {
        "shop": shop,
        "price_eur": round(5 + 300 * draw("price", product) ** 2, 2),
        "in_stock": draw(product) > 0.2,
    }


def find_coupon(shop: str) -> dict:
    """Find a voucher or discount code for a shop.

    Args:
        shop: Name of the shop.
    """
    return {"code": f"SAVE{5 + 5 * int(5 * draw('coupon', shop))}", "percent": 5 + 5 * int(5 * draw("coupon", shop))}


def track_parcel(order: str) -> dict:
    """Tell where an ordered parcel is and when it arrives.

    Args:
        order: Order number.
    """
    days = int(6 * draw("parcel", order))
    place = ("out for delivery", "in the sorting center", "in customs")[int(3 * draw("where", order))]
    return {"status": place, "arrives": str(TODAY + datetime.timedelta(days))}


def return_policy(shop: str) -> dict:
    """Tell within how many days a shop takes goods back and who pays the postage.

    Args:
        shop: Name of the shop.
    """
    return {"days": (14, 30, 60)[int(3 * draw("return", shop))], "free_postage": draw("post", shop) > 0.4}


def check_warranty(product: str, year: int) -> dict:
    """Tell whether something bought in a year is still under guarantee.

    Args:
        product: What was bought.
        year: Year of purchase.
    """
    ends = year + 2 + int(2 * draw("warranty", product))
    return {"covered": ends >= TODAY.year, "ends": ends}
