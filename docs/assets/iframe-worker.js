// Search runs in a worker, which browsers refuse where pages are opened as files. There this runs it in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const begin = () => {
        document.body.append(this.frame);
        const inner = this.frame.contentWindow;
        inner.postMessage = (data) => this.deliver(this, data);
        inner.importScripts = () => {};
        const script = inner.document.createElement("script");
        script.src = new URL(url, location.href).href;
        script.onload = () => {
          this.ready = true;
          for (const data of this.waiting) this.deliver(inner, data);
        };
        inner.document.documentElement.append(script);
      };
      if (document.body) begin();
      else addEventListener("DOMContentLoaded", begin);
    }

    deliver(target, data) {
      setTimeout(() => {
        const event = new MessageEvent("message", { data });
        target.dispatchEvent(event);
        if (target === this && this.onmessage) this.onmessage(event);
      });
    }

    postMessage(data) {
      if (this.ready) this.deliver(this.frame.contentWindow, data);
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
