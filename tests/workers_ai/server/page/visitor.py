"""A page in a browser, and what a user does with it."""

from tests.workers_ai.server.live import RUN, ask, wait_for

QUESTION = "What is the capital of Nepal?"
NASTY = (
    "</textarea><img src=x onerror='hacked=1'><script>hacked=1</script> "
    'it\'s "$HOME" `id` \\ \u202eback\u2067\U0001f98a\nend'
)


class Page:
    """The page in the browser."""

    def __init__(self, driver, address):
        self.driver = driver
        self.address = address
        self.refusals = 0  # answers with an error status that the test asks for; the browser reports each

    def __call__(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def text(self, name):
        return self("document.getElementById(arguments[0]).textContent", name)

    def set(self, **settings):
        """Set parameters as typing does."""
        for name, value in settings.items():
            self[name].clear()
            self[name].send_keys(str(value))

    def choose(self, name, label):
        from selenium.webdriver.support.select import Select

        Select(self[name]).select_by_visible_text(label)

    def chat(self):
        self.driver.find_element("css selector", "[value=chat]").click()

    def send(self, text):
        """Type, send, wait for the end; the answer."""
        self["text"].clear()
        self["text"].send_keys(text, "\n")
        self.settle()
        return self.answers()[-1] if self.answers() else None

    def settle(self):
        wait_for(lambda: self("running === null"))

    def answers(self):
        return self("[...document.querySelectorAll('.assistant .said')].map(box => box.textContent)")

    def tokens(self):
        return self.driver.find_elements("css selector", ".token")

    def rows(self):
        return self("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent.trim()))")


def native(address, **inputs):
    return ask(address, RUN, inputs).result["response"]


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()
