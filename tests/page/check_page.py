"""What the page does, as a user sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

SAID = 'Said <img src=x onerror="document.title=1"> '
FIRST = SAID[:20]


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answers(page: Page) -> Any:
    return page.locator(".message.assistant .text")


def test_a_message_is_answered_as_a_stream(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    send(page, "Hello")
    expect(page.locator(".message.user .text")).to_have_text("Hello")
    page.wait_for_function("document.querySelector('.message.assistant .text')?.textContent.length > 5")
    early = answers(page).inner_text()
    page.wait_for_function(f"document.querySelector('.message.assistant .text').textContent.length > {len(early) + 20}")
    assert answers(page).inner_text().startswith(early), "what was shown stays"
    expect(page.locator("#figures")).to_contain_text("first token after")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_whole_answer(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["real"])
    page.locator("#settings > summary").click()
    page.get_by_label("Temperature").fill("0")
    send(page, "What is a list?")
    expect(answers(page)).to_have_text(re.compile("^A list display is a list .* iterable.$"))
    expect(page.locator("#figures")).to_contain_text("26 tokens")


def test_stop_ends_the_answer_and_frees_the_slot(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    send(page, "Hello")
    page.wait_for_function("document.querySelector('.message.assistant .text')?.textContent.length > 5")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#figures")).to_contain_text("stopped")
    text = answers(page).inner_text()
    page.wait_for_timeout(300)
    assert answers(page).inner_text() == text
    page.wait_for_function(
        "fetch('/metrics').then(r => r.text()).then(t => /doge_num_requests_running\\{[^}]*\\} 0/.test(t))"
    )


def test_regenerate_replaces_the_last_answer(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    expect(page.get_by_role("button", name="Regenerate")).to_be_disabled()
    page.locator("#settings > summary").click()
    page.get_by_label("New tokens, at most").fill("8")
    send(page, "Hello")
    regenerate = page.get_by_role("button", name="Regenerate")
    expect(regenerate).to_be_enabled()
    first = answers(page).inner_text()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data) if request.method == "POST" else None)
    regenerate.click()
    expect(regenerate).to_be_enabled()
    assert answers(page).all_inner_texts() == [first]
    assert [message["role"] for message in json.loads(bodies[0])["messages"]] == ["user"]


def test_a_conversation_is_sent_whole(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    page.locator("#settings > summary").click()
    page.get_by_label("New tokens, at most").fill("4")
    page.get_by_label("System message").fill("Be brief.")
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data) if request.method == "POST" else None)
    for text in ("One", "Two"):
        send(page, text)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.locator(".message.user .text").last).to_have_text(text)
    sent = json.loads(bodies[1])
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["max_tokens"] == 4


def test_text_is_never_html(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    send(page, "<img src=x onerror='document.title=2'><script>document.title=3</script>")
    page.wait_for_function("document.querySelector('.message.assistant .text')?.textContent.includes('onerror=')")
    page.get_by_role("button", name="Stop").click()
    assert page.locator(".message img, .message script").count() == 0
    assert page.title() == "doge-deploy"
    assert "<script>" in page.locator(".message.user .text").inner_text()


def test_an_error_is_shown_and_the_chat_goes_on(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    page.locator("#settings > summary").click()
    page.get_by_label("Top-p").fill("5")
    send(page, "Hello")
    expect(page.get_by_role("alert").first).to_contain_text("top_p")
    expect(answers(page)).to_have_count(0)
    page.get_by_label("Top-p").fill("")
    page.get_by_label("New tokens, at most").fill("4")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#error")).to_be_hidden()


def test_a_server_that_is_gone_is_an_error(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Hello")
    expect(page.locator("#error")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_an_error_within_a_stream_is_shown(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    part = json.dumps({"choices": [{"index": 0, "delta": {"content": "So far"}, "finish_reason": None}]})
    failed = json.dumps({"error": {"message": "the logits hold NaN", "type": "server_error"}})
    body = f"data: {part}\n\ndata: {failed}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    send(page, "Hello")
    expect(page.locator("#error")).to_have_text("the logits hold NaN")
    expect(answers(page)).to_have_text("So far")


def test_a_key_is_asked_for_and_used(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["keys"])
    expect(page.locator("#error")).to_contain_text("API key is needed")
    page.locator("#settings > summary").click()
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#error")).to_be_hidden()
    page.get_by_label("New tokens, at most").fill("4")
    send(page, "Hello")
    expect(answers(page)).to_have_count(1)
    page.get_by_role("tab", name="Server").click()
    expect(page.locator(".tile").first).to_contain_text("ready")


def test_keyboard_only(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["slow"])
    keys = page.keyboard
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    keys.type("One line")
    keys.press("Shift+Enter")
    keys.type("and another")
    keys.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("One line\nand another")
    page.wait_for_function("document.querySelector('.message.assistant .text')?.textContent.length > 5")
    keys.press("Escape")
    expect(page.locator("#figures")).to_contain_text("stopped")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    for _ in range(12):
        keys.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "tab-chat":
            break
    expect(page.get_by_role("tab", name="Chat")).to_be_focused()
    keys.press("ArrowRight")
    expect(page.get_by_role("tab", name="Server")).to_be_focused()
    expect(page.locator("#server")).to_be_visible()
    keys.press("ArrowRight")
    expect(page.locator("#about")).to_be_visible()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus can be seen"


def test_new_chat_export_and_history(open_page: Any, servers: dict[str, str], tmp_path: Path) -> None:
    page = open_page(servers["slow"])
    page.locator("#settings > summary").click()
    page.get_by_label("New tokens, at most").fill("4")
    send(page, "Remember me")
    expect(page.get_by_role("button", name="Export")).to_be_enabled()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "conversation.json")
    saved = json.loads((tmp_path / "conversation.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    page.get_by_text("Earlier chats").click()
    page.get_by_role("button", name="Remember me").click()
    expect(page.locator(".message.user .text")).to_have_text("Remember me")
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Forget all").click()
    page.reload()
    expect(page.get_by_text("Earlier chats")).to_be_hidden()


def test_the_server_is_shown_live(open_page: Any, servers: dict[str, str]) -> None:
    page, other = open_page(servers["slow"]), open_page(servers["slow"])
    send(other, "Hello")
    page.get_by_role("tab", name="Server").click()
    expect(page.locator(".tile", has_text="slots in use")).to_contain_text("1 of 2")
    expect(page.locator("#slots .slot.busy")).to_have_count(1)
    expect(page.locator("#slots .slot")).to_have_count(2)
    expect(page.locator("#height")).to_have_text("The height of the drawing is 1.")
    expect(page.locator("#times tbody tr").first).to_contain_text("ms")
    other.get_by_role("button", name="Stop").click()
    expect(page.locator(".tile", has_text="slots in use")).to_contain_text("0 of 2")
    expect(page.locator("#slots .slot.busy")).to_have_count(0)


def test_what_is_served_is_shown(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["real"])
    page.get_by_role("tab", name="Model").click()
    card = page.locator(".card").first
    for text in ("doge-tiny", "causal-lm", "float32", "at most 512", "ort", "static"):
        expect(card).to_contain_text(text)


def test_what_was_verified_is_shown(open_page: Any, servers: dict[str, str]) -> None:
    page = open_page(servers["real"])
    page.get_by_role("tab", name="Model").click()
    expect(page.locator(".card").first).to_contain_text("Not judged at this start")
    page = open_page(servers["slow"])
    page.get_by_role("tab", name="Model").click()
    page.get_by_text("Verified: computes what <b>the reference</b> computes").click()
    expect(page.locator(".card details")).to_contain_text("25.0 % of its tolerance")
    expect(page.locator(".card details")).to_contain_text("Judged by a recording")


def test_nothing_is_fetched_from_elsewhere(browser: Browser, servers: dict[str, str]) -> None:
    page = browser.new_page()  # with the page's policy
    asked, refused = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: refused.append(message.text) if message.type == "error" else None)
    page.goto(servers["real"])
    send(page, "Hello")
    for name in ("Server", "Model", "Chat"):
        page.get_by_role("tab", name=name).click()
    expect(answers(page)).to_have_count(1)
    assert all(url.startswith((servers["real"], "data:")) for url in asked)
    assert not refused
    page.close()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(
    request: pytest.FixtureRequest, open_page: Any, servers: dict[str, str], width: int, scheme: str
) -> None:
    page = open_page(servers["slow"], viewport={"width": width, "height": 800}, color_scheme=scheme)
    folder = request.config.getoption("--shots")

    def shot(name: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
        if folder:
            page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png")

    shot("idle")
    send(page, "What is a list? " * 8)
    page.wait_for_function("document.querySelector('.message.assistant .text')?.textContent.length > 100")
    shot("streaming")
    assert page.get_by_role("button", name="Stop").is_visible()
    page.get_by_role("tab", name="Server").click()
    expect(page.locator("#times tbody tr").first).to_contain_text("ms")
    shot("server")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Stop").click()
    page.locator("#settings > summary").click()
    page.get_by_label("Top-p").fill("5")
    send(page, "And a tuple?")
    expect(page.locator("#error")).to_be_visible()
    shot("error")
    page.get_by_role("tab", name="Model").click()
    shot("model")
