import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

/**
 * POSTs its second argument to its first, as often as the third says, with the fourth as its key where there is one, and with the JDK's client as it
 * comes: it offers h2c with every request.
 */
class Ask {
  public static void main(String[] arguments) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    for (int turn = 0; turn < Integer.parseInt(arguments[2]); turn++) {
      HttpRequest request =
          HttpRequest.newBuilder(URI.create(arguments[0]))
              .header("content-type", "application/json")
              .header("authorization", arguments.length > 3 ? "Bearer " + arguments[3] : "none")
              .POST(BodyPublishers.ofString(arguments[1].replace("PADDING", "x".repeat(turn * 100000))))
              .build();
      var response = client.send(request, BodyHandlers.ofString());
      System.out.println(response.version() + " " + response.statusCode() + " " + response.body().replace("\n", " "));
    }
  }
}
