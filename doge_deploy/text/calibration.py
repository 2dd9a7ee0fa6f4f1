"""Text that scales of rounded activations are made of where a checkpoint brings none and none is given.

Written for this purpose: prose, code, numbers, other languages and a conversation. It shares no sentence with the text
by which `verify` judges quality.
"""

CALIBRATION_FILE = "calibration.txt"
"""A checkpoint's own text for this, beside its weights."""

CALIBRATION = """\
The bridge was closed for repairs in the spring, so the ferry ran twice as often. People who had never spoken to each
other before stood side by side at the rail and talked about the weather, the price of bread, and the new teacher at the
school. By autumn, when the bridge was open again, nobody wanted to give up the ferry.

def mean(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0

SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON orders.customer = customers.id GROUP BY name;

In 1928 a glass dish was left on a bench for two weeks. What grew in it killed the bacteria around it, and it took
twelve more years until somebody could make enough of it for one patient. From the laboratory to the hospital it
was 4.7 kilometres; the cost, 23,500 pounds.

User: How do I keep basil alive indoors?
Assistant: Give it light, at least six hours a day, and water it when the top of the soil is dry. Cut the tips often, so
that it grows wide and does not flower.
User: And in winter?
Assistant: Keep it away from cold windows. A small lamp helps.

Le train de 8 h 15 est en retard de vingt minutes. Der Zug um 8.15 Uhr hat zwanzig Minuten Verspätung. El tren de las
8:15 lleva veinte minutos de retraso. 8時15分の電車は二十分遅れています。

{"id": 17, "tags": ["red", "small"], "price": 12.5, "available": true, "notes": null}

If a and b are whole numbers and a * b is odd, then both are odd: an even factor would make the product even. So the
square of an odd number is odd, and (2k + 1)^2 = 4k^2 + 4k + 1.

She opened the letter slowly. Inside was a single sheet, folded twice, and on it one line: "The well behind the mill is
dry; look under the third step." She read it again, put on her coat, and went out into the rain with the door open.

# Install
1. Download the archive and unpack it.
2. Run `make`, then `make install`.
3. Restart the service; the log should say "ready" within a few seconds!
"""
