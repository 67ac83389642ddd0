"""Writes events.csv and items.csv: a small shop with invented customers, in the format that Slatewise trains on.

Each customer has two favourite categories and buys mostly from them: a pattern to learn. Run it in this folder:

    python make_events.py
"""

import csv
import random

CATEGORIES = ("books", "games", "garden", "kitchen", "music", "sports", "tools", "toys")
ITEMS_PER_CATEGORY = 25
CUSTOMERS = 300
EVENTS_PER_CUSTOMER = 40
START = 1_760_000_000  # unix seconds


def main() -> None:
    draw = random.Random(1)
    items = [
        (f"{category}-{k}", f"{category.title()} {k}", category, round(draw.uniform(2, 90), 2))
        for category in CATEGORIES
        for k in range(ITEMS_PER_CATEGORY)
    ]
    with open("items.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["item_id", "title", "category", "price"])
        table.writerows(items)
    with open("events.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user_id", "item_id", "timestamp", "action", "label_buy"])
        for customer in range(CUSTOMERS):
            favourites = draw.sample(CATEGORIES, 2)
            time = START + draw.randrange(30 * 86_400)
            for _ in range(EVENTS_PER_CUSTOMER):
                category = draw.choice(favourites) if draw.random() < 0.8 else draw.choice(CATEGORIES)
                row = CATEGORIES.index(category) * ITEMS_PER_CATEGORY + draw.randrange(ITEMS_PER_CATEGORY)
                bought = draw.random() < (0.5 if category in favourites else 0.1)
                table.writerow([f"customer-{customer}", items[row][0], time, "buy" if bought else "view", int(bought)])
                time += draw.randrange(60, 86_400)


if __name__ == "__main__":
    main()
