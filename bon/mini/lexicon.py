"""The words that fill the slots of the mini world: data only.

`LEXICON[kind]` are the values a slot of that kind can take. No value is in two kinds, so a value found in a text
says which constraint it belongs to. Values are lower case or names, and always follow a space in the templates, so that
a copied value is the same token in an instruction and in a response.

`MARKERS[kind]` are kinds that a response shows instead of naming: an instruction asks for a "formal" note, the
response carries one of the phrases that make it formal.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


MARKERS: dict[str, dict[str, tuple[str, ...]]] = {
    "tone": {
        "formal": ("Yours faithfully.", "With kind regards."),
        "friendly": ("Lots of love!", "Big hug!"),
        "urgent": ("Please act at once!", "There is no time to lose!"),
    },
    "ending": {
        "happy": ("Everyone cheered.", "They smiled for days."),
        "sad": ("Sadly, it was soon gone.", "Nobody could stop crying."),
        "surprising": ("Then it began to talk!", "It turned out to be magic!"),
    },
    "style": {
        "funny": ("Even cats giggle!", "No kidding, ha ha!"),
        "serious": ("You can rely on it.", "Built to the highest standard."),
        "poetic": ("Soft as moonlight.", "Like dew at dawn."),
    },
}

LEXICON: dict[str, tuple[str, ...]] = {
    "person": _words(
        "Anna Bruno Clara Daniel Edith Fatima Gustav Hana Ivan Julia Kofi Laura Marco Nadia Otto Paula Rafael Simone "
        "Theo Ursula Viktor Wanda Yusuf Zelda Arjun Bianca Conrad Dina Erik Frida Gabriel Helen Isaac Joan Kemal Lucia "
        "Milo Norah Pablo Ruth"
    ),
    "sender": _phrases(
        "Grandma, Grandpa, Uncle Ted, Aunt May, the neighbors, the whole team, the choir, the landlord, your cousins, "
        "the class"
    ),
    "city": _words(
        "Lagos Munich Bogota Hanoi Porto Ghent Krakow Tunis Perth Austin Dallas Montreal Naples Seville Lyon Bergen "
        "Osaka Mumbai Manila Santiago Tallinn Riga Cork Leeds Basel Turin Accra Izmir Bremen Tampa"
    ),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "time": ("noon", *(f"{hour} am" for hour in range(7, 12)), *(f"{hour} pm" for hour in range(1, 10))),
    "weather": _words("sunny rainy windy foggy snowy stormy cloudy chilly humid mild"),
    "chore": _phrases(
        "water the plants, feed the rabbits, pay the electrician, call the bank, return the ladder, mail the forms, "
        "sweep the porch, collect the laundry, renew the visa, charge the drill, lock the gate, empty the bins, "
        "sign the lease, test the alarm, repair the fence, wash the curtains, order the cake, book a taxi, "
        "print the photos, clean the fridge, mow the grass, buy light bulbs, pack the tent, bake the bread"
    ),
    "event": _phrases(
        "picnic, birthday party, reading circle, barbecue, wedding, concert, quiz night, team lunch, film evening, "
        "farewell dinner, workshop, chess match, brunch, tea party, graduation, dance class, housewarming, bonfire"
    ),
    "place": _phrases(
        "library, museum, harbor, stadium, theater, cathedral, zoo, aquarium, market, castle, lighthouse, gallery, "
        "station, town hall, clock tower, old mill, boathouse, greenhouse, square, pier"
    ),
    "dish": _phrases(
        "soup, curry, pancakes, lasagna, salad, stew, dumplings, sushi, chili, muffins, paella, ramen, waffles, "
        "goulash, falafel, pasta, cheesecake, tacos"
    ),
    "animal": _words(
        "fox owl bear rabbit wolf tiger turtle penguin hedgehog squirrel otter eagle donkey goat frog mouse parrot "
        "raven swan whale camel panda beaver lizard hamster"
    ),
    "trait": _words(
        "brave lazy clever tiny giant shy curious grumpy gentle lonely cheerful sleepy noisy proud clumsy wise hungry "
        "polite fearless dreamy"
    ),
    "object": _words(
        "lantern key map mirror compass feather coin telescope ring violin bottle crown letter bell sword kite diary "
        "teapot wagon button pearl ribbon hammer basket marble"
    ),
    "setting": _words(
        "forest desert valley cave meadow swamp jungle village mountain island garden attic canyon orchard cellar "
        "lagoon"
    ),
    "job": _words(
        "teacher nurse pilot baker farmer lawyer plumber sailor tailor chemist librarian mechanic journalist carpenter "
        "musician judge florist barber dentist painter"
    ),
    "hobby": _words(
        "yoga swimming gardening running cycling knitting archery sketching juggling sailing fishing surfing climbing "
        "origami pottery karate"
    ),
    "product": _words(
        "toothbrush bicycle jacket keyboard blender sofa camera watch speaker stapler skateboard helmet mattress "
        "kettle drone toaster"
    ),
    "quality": _words(
        "waterproof foldable silent lightweight wireless durable portable affordable magnetic comfortable sturdy sleek"
    ),
    "company": _words(
        "Acorn Bluefin Cobalt Dynamo Everest Falcon Granite Horizon Juniper Kestrel Lumen Mango Nimbus Pixel Quasar "
        "Tundra"
    ),
    "flaw": _phrases(
        "rattles loudly, smells of glue, leaks, squeaks, arrived late, has a crack, turns itself off, gets too hot, "
        "lost its color, came without screws"
    ),
    "rating": _words("two three four five"),
    "gift": _phrases(
        "scarf, mug, vase, novel, sweater, necklace, backpack, plant, photo album, board game, wallet, blanket, "
        "bracelet, lamp, hat, poster"
    ),
    "mishap": _phrases(
        "missing the call, losing the spare keys, breaking the window, coming late, forgetting the anniversary, "
        "spilling the paint, ignoring the message, eating the leftovers, scratching the table, waking the baby, "
        "deleting the files, burning the toast, denting the car, canceling the trip"
    ),
    "remedy": _phrases(
        "buy a replacement, cook dinner, help this weekend, pay for repairs, bring flowers, do the dishes, "
        "work overtime, send a refund, clean up, make it right"
    ),
    "gear": _words(
        "socks gloves sandals sunglasses batteries chargers flashlights raincoats pajamas shampoo towels swimsuits "
        "boots notebooks earplugs binoculars sunscreen toothpaste snacks slippers"
    ),
    **{kind: tuple(values) for kind, values in MARKERS.items()},
}
